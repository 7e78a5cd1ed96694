"""Captioned images: what is loaded, and what happens to samples that cannot be used."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from hive_vision.data.captions import (
    BadSample,
    Caption,
    CaptionDataset,
    load_captioned_images,
    load_splits,
)
from hive_vision.models.processing import HiveProcessor

START, END = 1, 2


def encode(captions: Sequence[str]) -> list[list[int]]:
    """A tokenizer whose ids can be read: a word becomes 10 + its number of letters."""
    return [[START, *(10 + len(word) for word in text.split()), END] for text in captions]


def picture(index: int) -> Image.Image:
    """An image that says which one it is, with enough noise to be worth truncating."""
    pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[0, 0] = index
    return Image.fromarray(pixels)


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def words(index: int) -> str:
    return " ".join(["word"] * (index % 5 + 1))


def write_metadata(folder: Path, rows: list[dict], kind: str = "jsonl") -> None:
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


def write_folder(
    folder: Path, count: int, kind: str = "jsonl", column: str = "caption", first: int = 0
) -> Path:
    folder.mkdir(parents=True)
    indices = range(first, first + count)
    for index in indices:
        picture(index).save(folder / f"{index:03}.png")
    rows = [{"file_name": f"{index:03}.png", column: words(index)} for index in indices]
    write_metadata(folder, rows, kind)
    return folder


def data_of(images: list[dict | None], captions: list[str | None]) -> datasets.Dataset:
    """Rows as ``load_captioned_images`` gives them; an image is its bytes and/or its path."""
    features = {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    return datasets.Dataset.from_dict(
        {"image": images, "caption": captions}, features=datasets.Features(features)
    )


def good(index: int) -> dict:
    return {"bytes": encoded(picture(index)), "path": None}


def first_pixel(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def one_line(failure: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(failure.value)
    assert message
    assert "\n" not in message
    return message


class TestFolders:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_image_folder(self, tmp_path: Path, kind: str) -> None:
        folder = write_folder(tmp_path / "images", 6, kind)
        parts = load_captioned_images(folder)
        assert [part.column_names for part in parts] == [["image", "caption"]] * 2
        seen = {}
        for part in parts:
            data = CaptionDataset(part, encode)
            for row, caption in enumerate(part["caption"]):
                seen[first_pixel(data[row]["image"])] = caption
        assert seen == {index: words(index) for index in range(6)}

    def test_source_may_be_a_string(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        train, held_out = load_captioned_images(str(folder))
        assert len(train) + len(held_out) == 4

    def test_caption_column_has_a_name_of_its_own(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4, column="text")
        train, held_out = load_captioned_images(folder, caption_column="text")
        assert train.column_names == held_out.column_names == ["image", "caption"]

    @pytest.mark.parametrize("name", ["train-station.png", "a test.png", "val_1.png", "dev/1.png"])
    def test_a_file_name_is_not_a_split(self, tmp_path: Path, name: str) -> None:
        # The datasets library reads splits into file names and would leave all others out.
        folder = write_folder(tmp_path / "images", 4)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "001.png").rename(folder / name)
        names = ["000.png", name, "002.png", "003.png"]
        write_metadata(folder, [{"file_name": one, "caption": "a"} for one in names])
        assert [len(part) for part in load_captioned_images(folder)] == [3, 1]

    def test_any_folder_name(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "my [best] images, test 2" / "validation", 4)
        assert [len(part) for part in load_captioned_images(folder)] == [3, 1]

    def test_other_columns_are_left_out(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        rows = [{"file_name": f"{i:03}.png", "caption": "a", "source": "web"} for i in range(4)]
        write_metadata(folder, rows)
        assert load_captioned_images(folder)[0].column_names == ["image", "caption"]

    def test_parquet_with_embedded_images(self, tmp_path: Path) -> None:
        rows = [{"picture": picture(i), "text": words(i), "id": i} for i in range(8)]
        (tmp_path / "data").mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train-00000.parquet")
        parts = load_captioned_images(tmp_path / "data", "picture", "text", holdout=0.25)
        assert [len(part) for part in parts] == [6, 2]
        samples = [sample for part in parts for sample in CaptionDataset(part, encode)]
        seen = {first_pixel(sample["image"]): sample["input_ids"] for sample in samples}
        assert seen == {index: encode([words(index)])[0] for index in range(8)}

    def test_missing_caption_column_lists_those_found(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4, column="text")
        with pytest.raises(ValueError, match="no column 'caption'") as failure:
            load_captioned_images(folder)
        message = one_line(failure)
        assert "columns are image, text" in message
        assert "data.caption_column" in message

    def test_missing_image_column_lists_those_found(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        with pytest.raises(ValueError, match="no column 'picture'") as failure:
            load_captioned_images(folder, image_column="picture")
        assert "columns are image, caption" in one_line(failure)
        assert "data.image_column" in str(failure.value)

    def test_images_without_metadata(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        (folder / "metadata.jsonl").unlink()
        with pytest.raises(ValueError, match="no column 'caption'") as failure:
            load_captioned_images(folder)
        one_line(failure)

    @pytest.mark.parametrize("kind", ["empty", "missing"])
    def test_nothing_there(self, tmp_path: Path, kind: str) -> None:
        folder = tmp_path / kind
        if kind == "empty":
            folder.mkdir()
        with pytest.raises(ValueError, match="no images found") as failure:
            load_captioned_images(folder)
        message = one_line(failure)
        assert str(folder) in message
        assert "metadata.jsonl" in message

    def test_file_instead_of_folder(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 4)
        with pytest.raises(
            ValueError, match=r"metadata\.jsonl' is a file; give the folder"
        ) as failure:
            load_captioned_images(folder / "metadata.jsonl")
        one_line(failure)

    @pytest.mark.parametrize("content", ['{"file_name": \n', '{"caption": "a"}\n', ""])
    def test_broken_metadata(self, tmp_path: Path, content: str) -> None:
        folder = write_folder(tmp_path / "images", 4)
        (folder / "metadata.jsonl").write_text(content)
        with pytest.raises(ValueError, match=str(folder)) as failure:
            load_captioned_images(folder)
        one_line(failure)

    @pytest.mark.parametrize("caption", [7, 0.5, ["two", "captions"]])
    def test_captions_that_are_not_text(self, tmp_path: Path, caption: object) -> None:
        folder = write_folder(tmp_path / "images", 4)
        write_metadata(folder, [{"file_name": f"{i:03}.png", "caption": caption} for i in range(4)])
        with pytest.raises(ValueError, match="caption") as failure:
            load_captioned_images(folder)
        one_line(failure)

    def test_one_sample_cannot_be_split(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 1)
        with pytest.raises(ValueError, match="has 1 samples; at least 2 are needed") as failure:
            load_captioned_images(folder)
        one_line(failure)

    def test_load_splits_keeps_their_names(self, tmp_path: Path) -> None:
        for index, split in enumerate(("train", "validation", "test")):
            write_folder(tmp_path / "all" / split, 2, first=2 * index)
        assert set(load_splits(tmp_path / "all")) == {"train", "validation", "test"}


class TestHeldOut:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = write_folder(tmp_path / "images", 20)
        rows = [{"file_name": f"{i:03}.png", "caption": f"number {i}"} for i in range(20)]
        write_metadata(folder, rows)
        return folder

    @pytest.mark.parametrize(("holdout", "size"), [(0.0, 4), (0.02, 4), (0.1, 4), (0.5, 10)])
    def test_split_is_disjoint_and_complete(self, folder: Path, holdout: float, size: int) -> None:
        train, held_out = load_captioned_images(folder, holdout=holdout)
        assert len(held_out) == size
        assert not set(train["caption"]) & set(held_out["caption"])
        assert set(train["caption"]) | set(held_out["caption"]) == {
            f"number {i}" for i in range(20)
        }

    def test_split_is_the_same_every_time(self, folder: Path) -> None:
        first = load_captioned_images(folder, holdout=0.25)
        np.random.seed(7)  # what a user's program may have done
        torch.manual_seed(7)
        second = load_captioned_images(folder, holdout=0.25)
        for one, other in zip(first, second, strict=True):
            assert list(one["caption"]) == list(other["caption"])

    def test_two_samples_are_enough(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 2)
        assert [len(part) for part in load_captioned_images(folder)] == [1, 1]

    def test_its_own_validation_split(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all" / "train", 6)
        write_folder(tmp_path / "all" / "validation", 3, first=10)
        train, held_out = load_captioned_images(tmp_path / "all", holdout=0.5)
        assert list(train["caption"]) == [words(index) for index in range(6)]
        assert list(held_out["caption"]) == [words(index) for index in range(10, 13)]

    def test_held_out_data_that_are_given(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all" / "train", 6)
        write_folder(tmp_path / "all" / "validation", 3, first=10)
        other = write_folder(tmp_path / "other", 2, first=20)
        train, held_out = load_captioned_images(tmp_path / "all", validation=other)
        assert len(train) == 6
        assert list(held_out["caption"]) == [words(20), words(21)]

    def test_missing_held_out_folder(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere") as failure:
            load_captioned_images(folder, validation=tmp_path / "nowhere")
        one_line(failure)

    def test_never_trains_on_the_validation_split(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all" / "validation", 6)
        with pytest.raises(ValueError, match="validation") as failure:
            load_captioned_images(tmp_path / "all")
        assert "train" in one_line(failure).replace(str(tmp_path), "")


def truncated(image_format: str) -> bytes:
    content = encoded(picture(9), image_format)
    return content[: len(content) // 2]


UNREADABLE = {
    "garbage": {"bytes": b"this is no image", "path": None},
    "no bytes": {"bytes": b"", "path": None},
    "truncated PNG": {"bytes": truncated("PNG"), "path": None},
    "truncated JPEG": {"bytes": truncated("JPEG"), "path": None},
    "missing file": {"bytes": None, "path": "/nowhere/at/all.png"},
    "null": None,
}


class TestBadSamples:
    @pytest.mark.parametrize("kind", UNREADABLE)
    def test_unreadable_image(self, kind: str) -> None:
        images = [good(index) for index in range(8)]
        images[3] = UNREADABLE[kind]
        data = CaptionDataset(data_of(images, [words(i) for i in range(8)]), encode)
        sample = data[3]
        replacement = sample["sample_id"]
        assert replacement != 3
        assert first_pixel(sample["image"]) == replacement
        assert sample["input_ids"] == encode([words(replacement)])[0]
        report = sample["bad_samples"]
        assert {bad.sample_id for bad in report} == {3}
        assert {bad.replaced_by for bad in report} == {replacement}
        assert report[0].source == ("/nowhere/at/all.png" if kind == "missing file" else "row 3")
        assert report[0].reason
        assert data[3]["bad_samples"] == report, "the report is not the same twice"

    @pytest.mark.parametrize("caption", ["", None, "   ", "\t\n"])
    def test_empty_caption(self, caption: str | None) -> None:
        captions: list[str | None] = [words(index) for index in range(8)]
        captions[5] = caption
        images = [good(index) | {"path": f"{index}.png"} for index in range(8)]
        sample = CaptionDataset(data_of(images, captions), encode)[5]
        assert sample["sample_id"] != 5
        assert first_pixel(sample["image"]) == sample["sample_id"]
        bad = sample["bad_samples"][0]
        assert (bad.sample_id, bad.source, bad.replaced_by) == (5, "5.png", sample["sample_id"])
        assert "empty caption" in bad.reason

    def test_files_of_an_image_folder(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", 8)
        (folder / "001.png").write_bytes(b"this is no image")
        content = (folder / "002.png").read_bytes()
        (folder / "002.png").write_bytes(content[: len(content) // 2])
        (folder / "003.png").unlink()
        train, _ = load_captioned_images(folder, validation=folder)
        bad = [sample["bad_samples"] for sample in CaptionDataset(train, encode)]
        assert [row for row in range(8) if bad[row]] == [1, 2, 3]
        for row in (1, 2, 3):
            assert bad[row][0].sample_id == row
            assert Path(bad[row][0].source) == folder / f"{row:03}.png"
        assert "FileNotFoundError" in bad[3][0].reason

    def test_good_samples_report_nothing(self) -> None:
        data = CaptionDataset(data_of([good(0), good(1)], ["one", "two words"]), encode)
        assert [sample["bad_samples"] for sample in (data[0], data[1])] == [[], []]
        assert [sample["sample_id"] for sample in (data[0], data[1])] == [0, 1]

    def test_every_bad_sample_on_the_way_is_reported(self) -> None:
        images = [good(0), *[UNREADABLE["garbage"]] * 7]
        data = CaptionDataset(data_of(images, [words(i) for i in range(8)]), encode)
        for row in range(1, 8):
            sample = data[row]
            assert sample["sample_id"] == 0
            assert sample["bad_samples"][0].sample_id == row
            assert all(1 <= bad.sample_id < 8 for bad in sample["bad_samples"])
            assert all(bad.replaced_by == 0 for bad in sample["bad_samples"])

    def test_all_bad(self) -> None:
        data = CaptionDataset(data_of([UNREADABLE["garbage"]] * 3, ["a", "b", "c"]), encode)
        with pytest.raises(ValueError, match="cannot be used") as failure:
            data[1]
        assert "UnidentifiedImageError" in one_line(failure)

    def test_replacements_are_spread(self) -> None:
        images = [good(index) for index in range(40)]
        captions = ["" if index % 2 else words(index) for index in range(40)]
        data = CaptionDataset(data_of(images, captions), encode)
        used = {data[index]["sample_id"] for index in range(1, 40, 2)}
        assert len(used) > 8, "bad samples all turn into the same few"


def mixed_data() -> CaptionDataset:
    """20 samples; rows 0, 3, 6, ... cannot be used, for three reasons."""
    images = [good(index) for index in range(20)]
    captions: list[str | None] = [words(index) for index in range(20)]
    for index in range(0, 20, 3):
        if index % 2:
            captions[index] = None
        else:
            images[index] = UNREADABLE["truncated PNG"]
    return CaptionDataset(data_of(images, captions), encode)


def facts(sample: Caption) -> tuple[int, int, tuple[int, ...], tuple[BadSample, ...]]:
    return (
        first_pixel(sample["image"]),
        sample["sample_id"],
        tuple(sample["input_ids"]),
        tuple(sample["bad_samples"]),
    )


def collate_facts(samples: list[Caption]) -> list[tuple]:
    return [facts(sample) for sample in samples]


class TestReplacementIsAFunctionOfTheRow:
    @pytest.fixture(scope="class")
    def expected(self) -> list[tuple]:
        data = mixed_data()
        return [facts(data[index]) for index in range(20)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_any_number_of_workers(self, expected: list[tuple], workers: int) -> None:
        torch.manual_seed(workers)
        loader = DataLoader(mixed_data(), 3, num_workers=workers, collate_fn=collate_facts)
        assert [sample for batch in loader for sample in batch] == expected

    @pytest.mark.parametrize("order", ["reversed", "shuffled", "alone"])
    def test_in_any_order(self, expected: list[tuple], order: str) -> None:
        indices: dict[str, Callable[[], Sequence[int]]] = {
            "reversed": lambda: range(19, -1, -1),
            "shuffled": lambda: np.random.default_rng(1).permutation(20),
            "alone": lambda: [6, 6, 6],
        }
        data = mixed_data()
        for seed, index in enumerate(indices[order]()):
            np.random.seed(seed)  # whatever else draws random numbers
            torch.manual_seed(seed)
            assert facts(data[index]) == expected[index]


class TestWhatASampleIs:
    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
    def test_every_image_is_rgb(self, mode: str) -> None:
        image_format = "JPEG" if mode == "CMYK" else "PNG"
        if mode == "I;16":
            image = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16))
        else:
            image = picture(0).convert(mode)
        content = encoded(image, image_format)
        assert Image.open(io.BytesIO(content)).mode == mode
        images = [{"bytes": content, "path": None}, good(1)]
        sample = CaptionDataset(data_of(images, ["one", "two"]), encode)[0]
        assert sample["bad_samples"] == []
        assert sample["image"].mode == "RGB"
        assert sample["image"].size == (16, 16)

    def test_lengths_are_those_of_the_token_ids(self) -> None:
        captions = [words(index) for index in (4, 0, 2, 3, 1)]
        data = CaptionDataset(data_of([good(i) for i in range(5)], captions), encode)
        assert data.lengths.tolist() == [7, 3, 5, 6, 4]
        assert [len(data[index]["input_ids"]) for index in range(5)] == data.lengths.tolist()
        assert [data[index]["input_ids"] for index in range(5)] == encode(captions)
        assert len(data) == 5

    def test_a_long_caption_keeps_its_end(
        self, tokenizer: transformers.PreTrainedTokenizerFast
    ) -> None:
        processor = HiveProcessor(
            transformers.SiglipImageProcessor(), tokenizer, max_text_tokens=77
        )
        captions = ["a small red circle " * 60, "a small red circle"]
        data = CaptionDataset(data_of([good(0), good(1)], captions), processor.encode_captions)
        assert data.lengths[0] == 77
        assert data.lengths[1] < 77
        for index in range(2):
            ids = data[index]["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in ids[:-1]
