"""Every format gives the same images with the same captions; what is missing is named."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_vision.data.images import decode_image
from hive_vision.data.sources import (
    CaptionSource,
    Source,
    caption_source,
    detect_format,
    load_splits,
    open_source,
)
from tests.data.helpers import (
    encoded,
    first_pixel,
    good,
    in_memory,
    one_line,
    picture,
    train_of,
    words,
    write_coco,
    write_folder,
    write_images,
    write_llava,
    write_metadata,
    write_shards,
)

COUNT = 6
CAPTIONS = [words(index) for index in range(COUNT)]


def image_folder(path: Path, captions: Sequence[str] = CAPTIONS, kind: str = "jsonl") -> Source:
    names = write_images(path / "photos", COUNT)
    pairs = zip(names, captions, strict=True)
    write_metadata(path / "photos", [{"file_name": n, "caption": c} for n, c in pairs], kind)
    return Source(str(path / "photos"))


def csv_folder(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    return image_folder(path, captions, "csv")


def parquet_metadata(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    return image_folder(path, captions, "parquet")


def llava(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    names = write_images(path / "images", COUNT)
    return Source(
        str(write_llava(path / "chat.json", names, captions)), images=str(path / "images")
    )


def coco(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    names = write_images(path, COUNT)  # beside the file
    return Source(str(write_coco(path / "x.json", names, [[caption] for caption in captions])))


def table(captions: Sequence[Any]) -> datasets.Dataset:
    images = [{"bytes": encoded(picture(i)), "path": f"{i:03}.png"} for i in range(COUNT)]
    return datasets.Dataset.from_dict({"image": images, "caption": list(captions)})


def parquet_folder(path: Path, captions: Sequence[Any] = CAPTIONS) -> Source:
    (path / "set").mkdir()
    table(captions).to_parquet(path / "set" / "train-00000.parquet")
    return Source(str(path / "set"))


def parquet_file(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    return Source(parquet_folder(path, captions).path + "/train-00000.parquet")


def saved_set(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    table(captions).save_to_disk(path / "saved")
    return Source(str(path / "saved"))


def saved_splits(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    datasets.DatasetDict(train=table(captions)).save_to_disk(path / "saved")
    return Source(str(path / "saved"))


def shards(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    return Source(str(write_shards(path / "shards", captions)))


def shard_pattern(path: Path, captions: Sequence[str] = CAPTIONS) -> Source:
    return Source(shards(path, captions).path + "/part-{00000..00001}.tar")


FORMATS = {
    make.__name__: make
    for make in (
        *(image_folder, csv_folder, parquet_metadata, llava, coco, parquet_folder, parquet_file),
        *(saved_set, saved_splits, shards, shard_pattern),
    )
}


def content(source: CaptionSource) -> list[tuple[str, int, list[str]]]:
    return [
        (
            source.image_name(row),
            first_pixel(decode_image(source.read_image(row))),
            source.captions_of(row),
        )
        for row in range(len(source))
    ]


EXPECTED = [(f"{i:03}.png", i, [words(i)]) for i in range(COUNT)]


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_same_content(self, tmp_path: Path, name: str) -> None:
        splits = open_source(FORMATS[name](tmp_path))
        assert splits.keys() == {"train"}
        source = splits["train"]
        assert sorted(content(source)) == EXPECTED
        assert source.pairs["image_row"] == list(range(COUNT))
        assert source.pairs["caption"] == [source.captions_of(row)[0] for row in range(COUNT)]
        assert content(pickle.loads(pickle.dumps(source))) == content(source)
        assert (source.shards is not None) == name.startswith("shard")

    @pytest.mark.parametrize("name", FORMATS)
    def test_fingerprint_knows_captions_but_no_place(self, tmp_path: Path, name: str) -> None:
        changed = [*CAPTIONS[:-1], "wort"]
        found = []
        for place, captions in (("one", CAPTIONS), ("other", CAPTIONS), ("third", changed)):
            (tmp_path / place).mkdir()
            source = FORMATS[name](tmp_path / place, captions)
            found.append(open_source(source)["train"].fingerprint)
        assert found[0] == found[1]
        assert found[0] != found[2]

    @pytest.mark.parametrize("form", ["coco", "shards", "parquet", "memory"])
    def test_several_captions(self, tmp_path: Path, form: str) -> None:
        captions = [[words(i), *["another"] * (i % 3)] for i in range(COUNT)]
        if form == "coco":
            names = write_images(tmp_path, COUNT)
            source = train_of(write_coco(tmp_path / "x.json", names, captions))
        elif form == "shards":
            source = train_of(write_shards(tmp_path / "s", captions))
        elif form == "parquet":
            source = open_source(parquet_folder(tmp_path, captions))["train"]
        else:
            source = in_memory([good(i) for i in range(COUNT)], captions)
        assert [source.captions_of(row) for row in range(COUNT)] == captions
        pairs = source.pairs
        assert pairs["image_row"] == [i for i in range(COUNT) for _ in captions[i]]
        assert pairs["caption"] == [caption for texts in captions for caption in texts]

    def test_images_without_captions_have_no_pairs(self) -> None:
        source = in_memory([good(i) for i in range(4)], [["a"], [], None, ["b", None]])
        assert source.pairs[:] == {"image_row": [0, 3, 3], "caption": ["a", "b", None]}
        assert [source.captions_of(row) for row in range(4)] == [["a"], [], [], ["b", ""]]

    def test_format_may_be_said(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "photos", COUNT)
        write_shards(folder, CAPTIONS)
        assert detect_format(str(folder)) == "imagefolder"
        assert train_of(folder, format="shards").shards is not None

    def test_detection_looks_inside(self, tmp_path: Path) -> None:
        llava(tmp_path)
        (tmp_path / "chat.json").rename(tmp_path / "anything")
        assert detect_format(str(tmp_path / "anything")) == "llava"
        coco(tmp_path)
        assert detect_format(str(tmp_path / "x.json")) == "coco"
        indented = json.dumps(json.loads((tmp_path / "x.json").read_text()), indent=1)
        (tmp_path / "x.json").write_text(indented)
        assert detect_format(str(tmp_path / "x.json")) == "coco"

    def test_built_data_say_their_fingerprint(self, tmp_path: Path) -> None:
        source = saved_set(tmp_path)
        manifest = tmp_path / "saved" / "manifest.json"
        manifest.write_text(json.dumps({"kind": "data", "fingerprint": "abc"}))
        assert train_of(source.path).fingerprint == "abc"
        manifest.write_text(json.dumps({"shards": 7}))  # somebody else's
        assert train_of(source.path).fingerprint != "abc"


class TestImageFolders:
    @pytest.mark.parametrize("name", ["train-station.png", "a test.png", "val_1.png", "dev/1.png"])
    def test_a_file_name_is_not_a_split(self, tmp_path: Path, name: str) -> None:
        # The datasets library reads splits into file names and would leave all others out.
        folder = write_folder(tmp_path / "images", 4)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "001.png").rename(folder / name)
        names = ["000.png", name, "002.png", "003.png"]
        write_metadata(folder, [{"file_name": one, "caption": "a"} for one in names])
        source = train_of(folder)
        assert sorted(source.image_name(row) for row in range(4)) == sorted(names)

    def test_any_folder_name(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "my [best] images, test 2" / "validation", 4)
        assert len(train_of(folder)) == 4

    def test_caption_column_has_a_name_of_its_own(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4, column="text")
        assert train_of(folder, caption_column="text").captions_of(1) == [words(1)]

    def test_splits_keep_their_names(self, tmp_path: Path) -> None:
        for index, split in enumerate(("train", "validation", "test")):
            write_folder(tmp_path / "all" / split, 2, first=2 * index)
        splits = open_source(Source(str(tmp_path / "all")))
        assert {split: source.name for split, source in splits.items()} == {
            "train": str(tmp_path / "all"),
            "validation": f"{tmp_path / 'all'}:validation",
            "test": f"{tmp_path / 'all'}:test",
        }
        (only,) = open_source(Source(str(tmp_path / "all"), split="test")).values()
        assert only.name == f"{tmp_path / 'all'}:test"
        assert set(load_splits(tmp_path / "all")) == {"train", "validation", "test"}


class TestMistakes:
    def fails(self, match: str, path: Path | str, **keys: str) -> str:
        with pytest.raises(ValueError, match=match) as failure:
            open_source(Source(str(path), **keys))
        assert str(path) in str(failure.value)
        return one_line(failure)

    def test_missing_columns_list_those_found(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4, column="text")
        message = self.fails("no column 'caption'", folder)
        assert "columns are image, text" in message
        assert "data.caption_column" in message
        message = self.fails("no column 'picture'", folder, image_column="picture")
        assert "columns are image, text" in message
        assert "data.image_column" in message

    def test_columns_of_another_kind(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        write_metadata(
            folder, [{"file_name": f"{i:03}.png", "caption": "a", "n": i} for i in range(4)]
        )
        self.fails("caption column 'n' .* holds int64, not text", folder, caption_column="n")
        self.fails("image column 'n' .* holds int64, not images", folder, image_column="n")

    @pytest.mark.parametrize("caption", [7, 0.5, [1, 2]])
    def test_captions_that_are_not_text(self, tmp_path: Path, caption: object) -> None:
        folder = write_folder(tmp_path / "images", 4)
        write_metadata(folder, [{"file_name": f"{i:03}.png", "caption": caption} for i in range(4)])
        self.fails("caption", folder)

    def test_images_without_metadata(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        (folder / "metadata.jsonl").unlink()
        self.fails("no column 'caption'", folder)

    @pytest.mark.parametrize("kind", ["empty", "missing"])
    def test_nothing_there(self, tmp_path: Path, kind: str) -> None:
        if kind == "empty":
            (tmp_path / kind).mkdir()
        assert "metadata.jsonl" in self.fails("no images found", tmp_path / kind)

    def test_metadata_instead_of_folder(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        self.fails(r"metadata\.jsonl' is a file; give the folder", folder / "metadata.jsonl")
        self.fails(r"000\.png' is a file; give the folder", folder / "000.png")

    @pytest.mark.parametrize("content", ['{"file_name": \n', '{"caption": "a"}\n', ""])
    def test_broken_metadata(self, tmp_path: Path, content: str) -> None:
        folder = write_folder(tmp_path / "images", 4)
        (folder / "metadata.jsonl").write_text(content)
        self.fails("no images found", folder)

    @pytest.mark.parametrize("make", [llava, coco])
    def test_another_image_folder(self, tmp_path: Path, make: Callable[[Path], Source]) -> None:
        path = make(tmp_path).path
        (tmp_path / "elsewhere").mkdir()
        message = self.fails("are not in", path, images=str(tmp_path / "elsewhere"))
        assert "000.png" in message
        assert "set images" in message

    @pytest.mark.parametrize("make", [saved_splits, shards, image_folder, coco])
    def test_missing_split(self, tmp_path: Path, make: Callable[[Path], Source]) -> None:
        assert "splits: train" in self.fails("no split 'dev'", make(tmp_path).path, split="dev")

    def test_weight(self) -> None:
        for weight in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="weight of 'photos' is") as failure:
                Source("photos", weight=weight)
            one_line(failure)


several_captions = st.lists(st.lists(st.sampled_from("abcd"), max_size=4), min_size=1, max_size=9)


class TestSelection:
    @given(captions=several_captions, data=st.data())
    @settings(deadline=None, derandomize=True, max_examples=40)
    def test_images_keep_their_captions(
        self, captions: list[list[str]], data: st.DataObject
    ) -> None:
        source = in_memory([None] * len(captions), [*captions])
        rows = data.draw(st.permutations(range(len(captions))).map(lambda p: p[: len(p) // 2 + 1]))
        part = source.select_images(rows)
        assert part.rows.tolist() == rows
        assert [part.captions_of(i) for i in range(len(part))] == [captions[row] for row in rows]
        assert part.pairs["caption"] == [text for row in rows for text in captions[row]]
        again = part.select_images(range(0, len(rows), 2))
        assert again.rows.tolist() == rows[::2]
        kept = np.flatnonzero([i % 3 > 0 for i in range(len(part.captions))])
        pairs = part.select_pairs(kept).pairs
        assert pairs["caption"] == [part.pairs["caption"][i] for i in kept]
        assert pairs["image_row"] == [part.pairs["image_row"][i] for i in kept]

    def test_images_move_with_their_rows(self, tmp_path: Path) -> None:
        for make in (shards, image_folder):
            part = train_of(make(tmp_path).path).select_images([4, 1])
            assert content(part) == [EXPECTED[4], EXPECTED[1]]
        assert train_of(tmp_path / "shards").select_images([5, 4]).shards.tolist() == [1, 0]

    def test_fingerprint_knows_the_selection(self) -> None:
        source = in_memory([None] * 4, ["a", "b", "c", "d"])
        found = {
            source.fingerprint,
            source.select_images([0, 1]).fingerprint,
            source.select_images([1, 0]).fingerprint,
            source.select_pairs(np.array([0, 1])).fingerprint,
            source.select_pairs(np.array([0, 2])).fingerprint,
        }
        assert len(found) == 5
        again = in_memory([None] * 4, ["a", "b", "c", "d"]).select_images([0, 1])
        assert again.fingerprint in found

    def test_fingerprint_knows_whose_caption_it_is(self) -> None:
        one, other = ([["a", "b"], ["c"]], [["a"], ["b", "c"]])
        assert in_memory([None] * 2, one).fingerprint != in_memory([None] * 2, other).fingerprint

    @given(texts=st.lists(st.text(max_size=5), min_size=2, max_size=8), chunk=st.integers(1, 4))
    @settings(deadline=None, derandomize=True, max_examples=40)
    def test_fingerprint_does_not_know_chunks(self, texts: list[str], chunk: int) -> None:
        parts = [
            datasets.Dataset.from_dict({"image": ["i"] * len(some), "caption": some})
            for some in (texts[i : i + chunk] for i in range(0, len(texts), chunk))
        ]
        whole = datasets.Dataset.from_dict({"image": ["i"] * len(texts), "caption": texts})
        joined = datasets.concatenate_datasets(parts)
        one, other = (caption_source(d, Source("x"), "x") for d in (whole, joined))
        assert one.fingerprint == other.fingerprint
        moved = datasets.Dataset.from_dict(
            {"image": ["i"] * len(texts), "caption": [texts[0] + texts[1], "", *texts[2:]]}
        )
        if texts[1]:
            assert caption_source(moved, Source("x"), "x").fingerprint != one.fingerprint


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./photos", "a/b/c", "chat.json", "../x"])
def test_what_is_no_hub_id_is_not_looked_for_there(path: str) -> None:
    with pytest.raises(ValueError, match="it does not exist: give"):
        load_splits(path)
