"""What verification finds, against a folder whose faults are known."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hive_vision.data.sources import CaptionSource, Source, open_source
from hive_vision.data.verification import (
    CHUNK,
    Inspection,
    caption_lengths,
    inspect_source,
    summarise,
)

CAPTIONS = {
    "good.png": ["a good one"],
    "damaged.png": ["a damaged one"],
    "text.png": ["not an image"],
    "tiny.png": ["a placeholder"],
    "several.png": ["first", " ", "third"],
    "none.png": [],
    "good again.png": ["a good one"],
    "good with another text.png": ["another text"],
}


def noise(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CaptionSource:
    good = noise(40, 20)
    images = dict.fromkeys(CAPTIONS, good) | {
        "damaged.png": noise(30, 30, seed=1)[:500],
        "text.png": b"<html>not found</html>",
        "tiny.png": noise(50, 7, seed=2),
        "several.png": noise(60, 60, seed=3),
        "none.png": noise(10, 10, seed=4),
    }
    rows = [
        {"image": {"path": name, "bytes": images[name]}, "caption": captions}
        for name, captions in CAPTIONS.items()
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
    )
    folder = tmp_path_factory.mktemp("faulty") / "data"
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(str(folder / "train.parquet"))
    return open_source(Source(path=str(folder)))["train"]


@pytest.fixture(scope="module")
def inspection(source: CaptionSource) -> Inspection:
    return inspect_source(source, 1, "looking")


def test_every_problem_has_a_line(source: CaptionSource, inspection: Inspection) -> None:
    found = {(p["image"], p["caption"]): p["reason"] for p in inspection.problems}
    assert len(found) == len(inspection.problems)
    assert found.keys() == {
        ("damaged.png", None),
        ("text.png", None),
        ("tiny.png", None),
        ("none.png", None),
        ("several.png", 1),
    }
    assert "truncated" in found["damaged.png", None]
    assert "cannot identify" in found["text.png", None]
    assert found["tiny.png", None] == "only 50 x 7 pixels"
    assert found["none.png", None] == "no caption"
    assert found["several.png", 1] == "empty caption"
    for problem in inspection.problems:
        assert source.image_name(problem["row"]) == problem["image"]
        json.dumps(problem)


def test_rows_are_those_of_the_whole_source(source: CaptionSource, inspection: Inspection) -> None:
    part = source.select_images([7, 3, 1])
    assert [p["row"] for p in inspect_source(part, 1, "looking").problems] == [3, 1]


def test_missing_files_and_missing_images(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(
        json.dumps(
            [
                {"id": n, "image": n, "conversations": [{"from": "human", "value": "?"}, turn]}
                for n in ("there.png", "lost.png")
                for turn in [{"from": "gpt", "value": "words"}]
            ]
        )
    )
    (tmp_path / "there.png").write_bytes(noise(9, 9))
    source = open_source(Source(path=str(tmp_path / "chat.json")))["train"]
    (problem,) = inspect_source(source, 1, "looking").problems
    assert (problem["image"], problem["reason"]) == ("lost.png", "the file does not exist")


def test_numbers(source: CaptionSource, inspection: Inspection) -> None:
    lengths = np.array([5, 3, 9, 1, 2, 4, 8, 7, 6])
    summary = summarise(inspection, lengths, max_text_tokens=7)
    assert summary == {
        "images": 8,
        "captions": 9,
        "usable_captions": 5,  # good, first, third, good again, with another text
        "unusable_images": 4,
        "empty_captions": 1,
        "image_size": {"smallest": [10, 10], "median": [40, 20], "largest": [60, 60]},
        "caption_tokens": {"median": 5, "percentile_95": 9, "longest": 9},
        "max_text_tokens": 7,
        "cut_captions": 2,
        "cut_share": 2 / 9,
        "duplicate_images": 2,
        "duplicate_pairs": 1,
    }


def test_nothing_usable() -> None:
    summary = summarise(Inspection.join([]), np.empty(0, np.int64), 77)
    assert (summary["images"], summary["image_size"], summary["caption_tokens"]) == (0, None, None)
    json.dumps(summary)


def test_same_with_several_processes(tmp_path: Path) -> None:
    images = [noise(8 + n % 5, 9, seed=n % 100) for n in range(CHUNK + 20)]
    images[::50] = [b"?"] * len(images[::50])
    rows = [{"image": {"path": None, "bytes": image}, "caption": "words"} for image in images]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "data"))
    source = open_source(Source(path=str(tmp_path / "data")))["train"]
    one, two = (inspect_source(source, workers, "looking") for workers in (1, 2))
    for name in ("sizes", "image_hashes", "pair_hashes"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert one.problems == two.problems
    assert len(one.problems) == len(images[::50])


@given(st.lists(st.integers(3, 400), min_size=1, max_size=60), st.integers(3, 400))
def test_lengths_agree_with_sorting(lengths: list[int], limit: int) -> None:
    summary = summarise(Inspection.join([]), np.array(lengths), limit)
    ordered = sorted(lengths)
    assert summary["cut_captions"] == sum(length > limit for length in lengths)
    tokens = summary["caption_tokens"]
    assert tokens["longest"] == ordered[-1]
    assert sum(length <= tokens["median"] for length in lengths) >= len(lengths) / 2
    assert sum(length <= tokens["percentile_95"] for length in lengths) >= 0.95 * len(lengths)
    assert {tokens["median"], tokens["percentile_95"]} <= set(lengths)


def test_caption_lengths_are_in_the_order_of_the_pairs(source: CaptionSource) -> None:
    lengths = caption_lengths(source, lambda texts: [list(text) for text in texts], "counting")
    assert lengths.tolist() == [len(text) for texts in CAPTIONS.values() for text in texts]
