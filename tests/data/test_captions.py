"""Captions with their images: what a sample is, and what happens to those that cannot be used."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from hive_vision.data.captions import Caption, CaptionDataset, split_held_out
from hive_vision.data.features import FeatureStore
from hive_vision.data.replacement import BadSample
from hive_vision.models.processing import HiveProcessor
from tests.data.helpers import (
    encode,
    encoded,
    first_pixel,
    good,
    in_memory,
    one_line,
    picture,
    train_of,
    words,
    write_folder,
    write_shards,
)


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


def dataset_of(images: list[dict | None], captions: list[str | None]) -> CaptionDataset:
    return CaptionDataset([in_memory(images, captions)], encode)


class TestBadSamples:
    @pytest.mark.parametrize("kind", UNREADABLE)
    def test_unreadable_image(self, kind: str) -> None:
        images = [good(index) for index in range(8)]
        images[3] = UNREADABLE[kind]
        data = dataset_of(images, [words(i) for i in range(8)])
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
        sample = dataset_of(images, captions)[5]
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
        bad = [sample["bad_samples"] for sample in CaptionDataset([train_of(folder)], encode)]
        assert [row for row in range(8) if bad[row]] == [1, 2, 3]
        for row in (1, 2, 3):
            assert bad[row][0].sample_id == row
            assert Path(bad[row][0].source) == folder / f"{row:03}.png"
        assert "FileNotFoundError" in bad[3][0].reason

    def test_good_samples_report_nothing(self) -> None:
        data = dataset_of([good(0), good(1)], ["one", "two words"])
        assert [sample["bad_samples"] for sample in (data[0], data[1])] == [[], []]
        assert [sample["sample_id"] for sample in (data[0], data[1])] == [0, 1]

    def test_every_bad_sample_on_the_way_is_reported(self) -> None:
        images = [good(0), *[UNREADABLE["garbage"]] * 7]
        data = dataset_of(images, [words(i) for i in range(8)])
        for row in range(1, 8):
            sample = data[row]
            assert sample["sample_id"] == 0
            assert sample["bad_samples"][0].sample_id == row
            assert all(1 <= bad.sample_id < 8 for bad in sample["bad_samples"])
            assert all(bad.replaced_by == 0 for bad in sample["bad_samples"])

    def test_all_bad(self) -> None:
        data = dataset_of([UNREADABLE["garbage"]] * 3, ["a", "b", "c"])
        with pytest.raises(ValueError, match="cannot be used") as failure:
            data[1]
        assert "UnidentifiedImageError" in one_line(failure)

    def test_replacements_are_spread(self) -> None:
        images = [good(index) for index in range(40)]
        captions = ["" if index % 2 else words(index) for index in range(40)]
        data = dataset_of(images, captions)
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
    return dataset_of(images, captions)


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
    def test_lengths_are_those_of_the_token_ids(self) -> None:
        captions = [words(index) for index in (4, 0, 2, 3, 1)]
        data = dataset_of([good(i) for i in range(5)], captions)
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
        source = in_memory([good(0), good(1)], captions)
        data = CaptionDataset([source], processor.encode_captions)
        assert data.lengths[0] == 77
        assert data.lengths[1] < 77
        for index in range(2):
            ids = data[index]["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in ids[:-1]


class TestSeveralSources:
    def mixture(self, tmp_path: Path, **options: object) -> CaptionDataset:
        """5 pairs of 3 images, 4 images of a folder, 6 in shards."""
        pairs = in_memory([good(i) for i in range(20, 23)], [["a b", "c"], ["d e f"], ["g", "h i"]])
        folder = train_of(write_folder(tmp_path / "photos", 4, first=10))
        shards = train_of(write_shards(tmp_path / "shards", [words(i) for i in range(6)]))
        return CaptionDataset([pairs, folder, shards], encode, **options)

    def test_samples_are_all_pairs_in_turn(self, tmp_path: Path) -> None:
        data = self.mixture(tmp_path)
        captions = ["a b", "c", "d e f", "g", "h i", *map(words, (10, 11, 12, 13, *range(6)))]
        images = [20, 20, 21, 22, 22, 10, 11, 12, 13, *range(6)]
        assert len(data) == 15
        for row, sample in enumerate(data):
            assert first_pixel(sample["image"]) == images[row]
            assert sample["input_ids"] == encode([captions[row]])[0]
            assert sample["sample_id"] == row
        assert data.lengths.tolist() == [len(ids) for ids in encode(captions)]

    @pytest.mark.parametrize("group", [False, True])
    def test_features_stand_where_images_do(self, group: bool, tmp_path: Path) -> None:
        data = self.mixture(tmp_path, group_captions=group)
        images = data.distinct_images
        assert len(images) == 13
        store = FeatureStore(tmp_path / "features", "", 15, (1, 1, 1), torch.float32)
        numbers = [float(first_pixel(images.decode(number))) for number in range(13)]
        store.append(torch.tensor([-1.0, -1.0, *numbers]).view(15, 1, 1, 1), [None] * 15)
        featured = pickle.loads(pickle.dumps(data.with_features(store, 2)))
        found = [sample["image"] for sample in featured]
        assert [float(one) for one in found] == [first_pixel(one["image"]) for one in data]
        assert (found[0] is found[1]) == group
        assert float(featured.with_images_of(0, 7)["image"]) == first_pixel(data[7]["image"])
        assert data.images_per_sample == (13 / 15 if group else 1)
        assert first_pixel(data[0]["image"]) == 20  # the plain ones stay

    def test_sample_ids_may_be_others(self, tmp_path: Path) -> None:
        data = self.mixture(tmp_path, sample_ids=np.arange(100, 115))
        assert [sample["sample_id"] for sample in data] == list(range(100, 115))

    def test_parts_say_what_the_order_needs(self, tmp_path: Path) -> None:
        data = self.mixture(tmp_path, weights=[2.0, 0.5, 1.0])
        assert [part.size for part in data.parts] == [5, 4, 6]
        assert [part.weight for part in data.parts] == [2.0, 0.5, 1.0]
        assert [part.shards is None for part in data.parts] == [True, True, False]
        assert data.parts[2].shards.tolist() == [0, 0, 0, 0, 0, 1]
        assert data.epoch_size == 10 + 2 + 6

    def test_every_caption_has_the_shard_of_its_image(self, tmp_path: Path) -> None:
        captions = [["a"] * (1 + index % 3) for index in range(6)]
        data = CaptionDataset([train_of(write_shards(tmp_path, captions))], encode)
        assert data.parts[0].shards.tolist() == [0] * 9 + [1] * 3

    def test_replacements_come_from_all_sources(self, tmp_path: Path) -> None:
        bad = in_memory([UNREADABLE["garbage"]] * 40, ["a"] * 40)
        shards = train_of(write_shards(tmp_path, [words(i) for i in range(6)]))
        data = CaptionDataset([bad, shards], encode, sample_ids=np.arange(46) + 1000)
        sample = data[0]
        assert sample["sample_id"] >= 1040
        assert sample["bad_samples"][0].sample_id == 1000
        assert {entry.replaced_by for entry in sample["bad_samples"]} == {sample["sample_id"]}

    def test_a_missing_shard_is_reported(self, tmp_path: Path) -> None:
        data = self.mixture(tmp_path)
        (tmp_path / "shards" / "part-00001.tar").unlink()
        (bad, *_) = data[14]["bad_samples"]
        assert bad.source == "005.png"
        assert "No such file" in bad.reason

    def test_in_worker_processes(self, tmp_path: Path) -> None:
        data = self.mixture(tmp_path)
        expected = [facts(data[index]) for index in range(15)]
        for one in (data, pickle.loads(pickle.dumps(data))):
            loader = DataLoader(one, 4, num_workers=2, collate_fn=collate_facts)
            assert [sample for batch in loader for sample in batch] == expected


class TestGroupedCaptions:
    """Five captions for each of six images in two sources."""

    def data(self, bad: int | None = None, **options: Any) -> CaptionDataset:
        stored = [good(index) if index != bad else UNREADABLE["garbage"] for index in range(6)]
        texts = [[f"{'w' * (index + 1)} {'v' * n}" for n in range(1, 6)] for index in range(6)]
        sources = [in_memory(stored[:4], texts[:4], "one"), in_memory(stored[4:], texts[4:], "two")]
        return CaptionDataset(sources, encode, **{"group_captions": True, **options})

    def test_neighbours_share_one_image(self) -> None:
        data = self.data()
        seen = [sample["image"] for sample in data]
        assert [first_pixel(image) for image in seen] == [row // 5 for row in range(30)]
        assert len({id(image) for image in seen}) == 6
        plain = [sample["image"] for sample in self.data(group_captions=False)]
        assert len({id(image) for image in plain}) == 30
        for one, other in zip(seen, plain, strict=True):
            assert one.tobytes() == other.tobytes()

    def test_parts_say_which_captions_belong_together(self) -> None:
        parts = self.data().parts
        assert [part.groups.tolist() for part in parts] == [
            [row // 5 for row in range(20)],
            [0] * 5 + [1] * 5,
        ]
        assert [part.groups for part in self.data(group_captions=False).parts] == [None, None]

    def test_captions_of_a_bad_image_are_replaced_one_by_one(self) -> None:
        data, plain = self.data(bad=2), self.data(bad=2, group_captions=False)
        for row in (*range(8, 17), *range(16, 7, -1)):
            sample = data[row]
            assert facts(sample) == facts(plain[row])
            assert first_pixel(sample["image"]) == sample["sample_id"] // 5 != 2
            assert bool(sample["bad_samples"]) == (row // 5 == 2)

    def test_others_images_are_others(self) -> None:
        data = self.data()
        for row in range(30):
            other = (row + 15) % 30
            sample = data.with_images_of(row, other)
            assert first_pixel(sample["image"]) == other // 5
            assert sample["sample_id"] == row

    def test_the_last_image_is_not_carried_along(self) -> None:
        data = self.data()
        before = len(pickle.dumps(data))
        assert first_pixel(data[7]["image"]) == 1
        assert len(pickle.dumps(data)) == before
        assert facts(pickle.loads(pickle.dumps(data))[8]) == facts(data[8])

    def test_in_worker_processes(self) -> None:
        data = self.data(bad=2)
        expected = [facts(data[row]) for row in range(30)]
        loader = DataLoader(data, 4, num_workers=2, collate_fn=collate_facts)
        assert [sample for batch in loader for sample in batch] == expected


class TestStoredTokens:
    def test_are_made_once(self, tmp_path: Path) -> None:
        source = in_memory([good(0), good(1)], [f"one {tmp_path}", "two words"])
        calls = []

        def counting(captions: Sequence[str]) -> list[list[int]]:
            calls.append(len(captions))
            return encode(captions)

        first = CaptionDataset([source], counting, encoding="a")
        again = CaptionDataset([source], counting, encoding="a")
        assert calls == [2]
        assert [one["input_ids"] for one in again] == [one["input_ids"] for one in first]
        CaptionDataset([source], counting, encoding="b")
        CaptionDataset([source.select_images([1])], counting, encoding="a")
        assert calls == [2, 2, 1], "another tokenizer or other data took the stored ids"

    def test_are_not_carried_along(self, tmp_path: Path) -> None:
        sizes = []
        for count in (20, 220):
            folder = tmp_path / str(count)
            caption = " ".join(["word"] * 50)
            source = train_of(write_shards(folder, [caption] * count, per_shard=count))
            sizes.append(len(pickle.dumps(CaptionDataset([source], encode, encoding="a"))))
        assert (sizes[1] - sizes[0]) / 200 < 64, "bytes for each sample"


class TestHeldOut:
    @pytest.mark.parametrize(("holdout", "size"), [(0.0, 4), (0.02, 4), (0.1, 4), (0.5, 10)])
    def test_split_is_disjoint_and_complete(self, holdout: float, size: int) -> None:
        source = in_memory([None] * 20, [f"number {i}" for i in range(20)])
        train, held_out = split_held_out(source, holdout)
        assert len(held_out) == size
        assert sorted([*train.rows, *held_out.rows]) == list(range(20))
        assert train.rows.tolist() == sorted(train.rows)

    def test_all_captions_of_an_image_stay_together(self) -> None:
        source = in_memory([None] * 12, [[f"{i} {j}" for j in range(i % 4)] for i in range(12)])
        train, held_out = split_held_out(source, 0.3)
        images = [{text.split()[0] for text in part.pairs["caption"]} for part in (train, held_out)]
        assert not images[0] & images[1]
        assert len(train.pairs) + len(held_out.pairs) == len(source.pairs)

    def test_split_is_the_same_every_time(self) -> None:
        source = in_memory([None] * 20, ["a"] * 20)
        first = split_held_out(source, 0.25)
        np.random.seed(7)  # what a user's program may have done
        torch.manual_seed(7)
        second = split_held_out(source, 0.25)
        for one, other in zip(first, second, strict=True):
            assert one.rows.tolist() == other.rows.tolist()

    def test_two_images_are_enough_and_one_is_not(self) -> None:
        parts = split_held_out(in_memory([None] * 2, ["a", "b"]), 0.02)
        assert [len(part) for part in parts] == [1, 1]
        with pytest.raises(ValueError, match="has 1 images; at least 2 are needed") as failure:
            split_held_out(in_memory([None], ["a"]), 0.02)
        one_line(failure)

    def test_holdout_of_everything(self) -> None:
        with pytest.raises(ValueError, match="holdout is 1") as failure:
            split_held_out(in_memory([None] * 20, ["a"] * 20), 1.0)
        one_line(failure)
