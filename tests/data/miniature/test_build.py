import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hive_vision.data.miniature import (
    CLASSIFICATION_SETS,
    MiniatureData,
    build_miniature_data,
)
from hive_vision.data.miniature.scenes import split_digit_scans
from tests.data.miniature.conftest import SETTINGS
from tests.data.miniature.test_questions import answer

TINY = MiniatureData(
    train_scenes=6, validation_scenes=4, classification_train=8, classification_test=8
)


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def metadata(folder, split):
    path = folder / "captions" / split / "metadata.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_same_seed_same_bytes_whatever_the_hash_seed(tmp_path):
    build_miniature_data(tmp_path / "here", TINY)
    code = (
        "import sys; from pathlib import Path\n"
        "from hive_vision.data.miniature import MiniatureData, build_miniature_data\n"
        f"build_miniature_data(Path(sys.argv[1]), {TINY!r})"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        check=True,
        env={
            **os.environ,
            "PYTHONHASHSEED": "12345",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    assert hashes(tmp_path / "here") == hashes(tmp_path / "there")
    assert len(hashes(tmp_path / "here")) == 2 * (6 + 4) + 2 + 2 + 12


def test_other_seed_other_data(tmp_path, miniature):
    other = replace(TINY, seed=SETTINGS.seed + 1)
    build_miniature_data(tmp_path / "other", other)
    assert metadata(tmp_path / "other", "train")[0] != metadata(miniature, "train")[0]


def test_more_scenes_leave_the_first_ones_as_they_are(tmp_path, miniature):
    build_miniature_data(tmp_path / "few", replace(TINY, seed=SETTINGS.seed))
    few, many = hashes(tmp_path / "few"), hashes(miniature)
    name = "captions/train/000005.png"
    assert few[name] == many[name]
    assert metadata(tmp_path / "few", "train") == metadata(miniature, "train")[:6]


def test_splits_share_no_scene(miniature):
    images = [digest for name, digest in hashes(miniature).items() if name.startswith("captions/")]
    assert len(images) == len(set(images))


def test_loads_as_an_image_folder(miniature, tmp_path):
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(miniature / "captions"), cache_dir=str(tmp_path)
    )
    assert loaded["train"].num_rows == SETTINGS.train_scenes
    assert loaded["validation"].num_rows == SETTINGS.validation_scenes
    row, record = loaded["validation"][7], metadata(miniature, "validation")[7]
    assert row["image"].size == (48, 48)
    assert row["image"].mode == "RGB"
    assert row["caption"] == record["caption"]
    assert row["coarse_caption"] == record["coarse_caption"]
    assert row["objects"] == record["objects"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_metadata_and_masks_describe_each_object(miniature, split):
    for record in metadata(miniature, split):
        with Image.open(miniature / "masks" / split / record["file_name"]) as image:
            mask = np.asarray(image)
        assert mask.max() == len(record["objects"])
        for number, thing in enumerate(record["objects"], start=1):
            rows, columns = np.nonzero(mask == number)
            assert thing["box"] == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
            start, end = thing["words"]
            phrase = record["caption"][start:end].lower()
            assert phrase.startswith(("a ", "an "))
            assert (thing["texture"] is None) == (thing["kind"] == "digit")
            assert (thing["scan"] is None) == (thing["kind"] == "shape")


def test_held_out_scans_are_in_validation_only(miniature):
    train, held_out = split_digit_scans(SETTINGS.seed)
    used = {
        split: {
            thing["scan"]
            for record in metadata(miniature, split)
            for thing in record["objects"]
            if thing["scan"] is not None
        }
        for split in ("train", "validation")
    }
    assert all(used.values())
    assert used["train"] <= set(train.ids)
    assert used["validation"] <= set(held_out.ids)


def test_classification_tests_draw_held_out_scans(tmp_path, monkeypatch):
    """Every digit of a test file is a held-out scan, every one of a training file is not."""
    from hive_vision.data.miniature import build

    seen = []
    real = build.draw_scene

    def spy(rng, looks, scans, size):
        scene = real(rng, looks, scans, size)
        seen.append([thing.scan for thing in scene.things if thing.scan is not None])
        return scene

    monkeypatch.setattr(build, "draw_scene", spy)
    build_miniature_data(tmp_path / "data", TINY)
    train, _ = split_digit_scans(TINY.seed)
    sets = seen[TINY.train_scenes + TINY.validation_scenes :]
    for start in range(0, len(sets), 16):
        assert all(scan in train.ids for scans in sets[start : start + 8] for scan in scans)
        assert all(
            scan not in train.ids for scans in sets[start + 8 : start + 16] for scan in scans
        )


@pytest.mark.parametrize("name", CLASSIFICATION_SETS)
@pytest.mark.parametrize("part", ["train", "test"])
def test_classification_sets_load_and_are_balanced(miniature, tmp_path, name, part):
    path = miniature / "classification" / name / f"{part}.parquet"
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    expected = SETTINGS.classification_train if part == "train" else SETTINGS.classification_test
    assert loaded.num_rows == expected
    assert loaded.features["label"].names == list(CLASSIFICATION_SETS[name])
    assert loaded[0]["image"].size == (48, 48)
    counts = Counter(loaded["label"])
    classes = len(CLASSIFICATION_SETS[name])
    assert len(counts) == min(classes, expected)
    assert max(counts.values()) - min(counts.values()) <= 1
    # Shuffled: labels in order would let a truncated set lack classes.
    assert list(loaded["label"]) != sorted(loaded["label"])


def test_the_sets_go_from_coarse_to_fine():
    sizes = [len(classes) for classes in CLASSIFICATION_SETS.values()]
    assert dict(zip(CLASSIFICATION_SETS, sizes, strict=True)) == {
        "kind": 2,
        "colour": 8,
        "shape": 6,
        "texture": 6,
        "digit": 10,
        "shape_texture": 36,
    }


@pytest.mark.parametrize(
    ("part", "split", "each"), [("train", "train", 1), ("test", "validation", 2)]
)
def test_questions_are_about_their_image(miniature, tmp_path, part, split, each):
    path = miniature / "questions" / f"{part}.parquet"
    rows = pq.read_table(path).to_pylist()
    records = metadata(miniature, split)
    assert len(rows) == each * len(records)
    by_name = {record["file_name"]: record["objects"] for record in records}
    for row in rows:
        name = row["image"]["path"]
        assert row["image"]["bytes"] == (miniature / "captions" / split / name).read_bytes()
        things = [AsThing(thing) for thing in by_name[name]]
        assert row["answer"] == answer(row["question"], things)
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    assert loaded.column_names == ["image", "question", "answer", "type"]
    assert loaded[0]["image"].size == (48, 48)


class AsThing:
    """The attributes of a record in metadata.jsonl."""

    def __init__(self, record):
        self.__dict__.update(record)


def test_classification_images_show_their_class(miniature):
    """The colour set by its drawn colour: labels and images belong together."""
    from hive_vision.data.miniature.scenes import COLOURS

    rows = pq.read_table(miniature / "classification" / "colour" / "test.parquet").to_pylist()
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    right = 0
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            pixels = np.asarray(image).reshape(-1, 3) / 255
        vivid = pixels[np.argsort(np.ptp(pixels, axis=1))[-30:]].mean(0)
        right += names[int(np.abs(values - vivid).sum(1).argmin())] == names[row["label"]]
    assert right > 0.8 * len(rows)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    from hive_vision.data.miniature import build

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_write_classification", fail)
    with pytest.raises(KeyboardInterrupt):
        build_miniature_data(tmp_path / "data", TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"exists already: delete it or choose another"):
        build_miniature_data(tmp_path / "data", TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 16}, "image_size is 16"), ({"train_scenes": 0}, "train_scenes is 0")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
