"""A recipe's data section: sources, held-out images, quarantine, stored token ids, fingerprint."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_vision.data.captions import CaptionDataset
from hive_vision.data.quarantine import write_quarantine
from hive_vision.data.sources import Source
from hive_vision.models.processing import HiveProcessor
from hive_vision.training.arguments import DataArguments
from hive_vision.training.run_data import (
    RunData,
    _at_most,
    _caption_encoding,
    load_run_data,
    open_parts,
)
from tests.conftest import make_tokenizer
from tests.data.helpers import (
    first_pixel,
    in_memory,
    words,
    write_coco,
    write_folder,
    write_images,
    write_shards,
)


def processor_with(
    max_text_tokens: int = 77, tokenizer: transformers.PreTrainedTokenizerFast | None = None
) -> HiveProcessor:
    image_processor = transformers.SiglipImageProcessor()
    return HiveProcessor(image_processor, tokenizer or make_tokenizer(), max_text_tokens)


def load(train: Any, **options: Any) -> RunData:
    return load_run_data(DataArguments(train, **options), processor_with())


def images(data: CaptionDataset) -> list[int]:
    return [first_pixel(sample["image"]) for sample in data]


def test_captions_are_split_and_tokenized(recipe: Callable) -> None:
    arguments = recipe()
    processor = HiveProcessor.from_backbones(arguments.model.vision, arguments.model.language)
    data = load_run_data(arguments.data, processor)
    assert len(data.train) + len(data.held_out) == 40
    assert data.samples == len(data.train)
    assert data.excluded == 0
    for part in (data.train, data.held_out):
        assert part[0]["input_ids"][0] == processor.start_token_id


class TestHeldOut:
    def test_split_off(self, tmp_path: Path) -> None:
        data = load(str(write_folder(tmp_path / "photos", 20)), holdout=0.25)
        assert len(data.held_out) == 5
        assert sorted(images(data.train) + images(data.held_out)) == list(range(20))

    def test_its_own_validation_split(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all" / "train", 6)
        write_folder(tmp_path / "all" / "validation", 3, first=10)
        data = load(str(tmp_path / "all"), holdout=0.5)
        assert sorted(images(data.train)) == list(range(6))
        assert sorted(images(data.held_out)) == [10, 11, 12]

    def test_held_out_data_that_are_given(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all" / "train", 6)
        write_folder(tmp_path / "all" / "validation", 3, first=10)
        other = write_folder(tmp_path / "other", 2, first=20)
        data = load(str(tmp_path / "all"), validation=str(other))
        assert sorted(images(data.train)) == list(range(6))
        assert sorted(images(data.held_out)) == [20, 21]

    def test_a_split_that_is_asked_for(self, tmp_path: Path) -> None:
        for index, split in enumerate(("train", "validation", "test")):
            write_folder(tmp_path / "all" / split, 4, first=10 * index)
        path = str(tmp_path / "all")
        data = load(Source(path, split="test"), validation=Source(path, split="train"))
        assert sorted(images(data.train)) == [20, 21, 22, 23]
        assert sorted(images(data.held_out)) == [0, 1, 2, 3]

    def test_never_trains_on_the_validation_split(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "all" / "validation", 6)
        with pytest.raises(ValueError, match="has no split 'train'; its splits: only validation"):
            load(str(tmp_path / "all"))

    def test_missing_held_out_folder(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "photos", 6)
        with pytest.raises(ValueError, match="nowhere"):
            load(str(folder), validation=str(tmp_path / "nowhere"))

    def test_captions_of_an_image_stay_on_one_side(self, tmp_path: Path) -> None:
        names = write_images(tmp_path, 15)
        path = write_coco(tmp_path / "x.json", names, [[words(i)] * (i % 4) for i in range(15)])
        data = load(str(path), holdout=0.3)
        assert not set(images(data.train)) & set(images(data.held_out))
        assert len(data.train) + len(data.held_out) == sum(i % 4 for i in range(15))

    @given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), limit=st.integers(1, 60))
    @settings(deadline=None, derandomize=True, max_examples=30)
    def test_at_most_so_many(self, sizes: list[int], limit: int) -> None:
        sources = [in_memory([None] * size, ["a"] * size) for size in sizes]
        cut = [len(source.captions) for source in _at_most(limit, sources)]
        assert sum(cut) == min(limit, sum(sizes))
        if len(cut) == len(sizes):
            shares = [limit * size / sum(sizes) for size in sizes]
            assert all(
                abs(n - min(s, size)) <= 1 for n, s, size in zip(cut, shares, sizes, strict=True)
            )


class TestMixture:
    def sources(self, tmp_path: Path) -> list[Source]:
        names = write_images(tmp_path / "coco", 3, first=20)
        coco = write_coco(tmp_path / "coco" / "x.json", names, [["a"], ["b", "c"], ["d"]])
        return [
            Source(str(write_folder(tmp_path / "photos", 8)), weight=0.5),
            Source(str(coco), weight=2.0),
            Source(str(write_shards(tmp_path / "shards", [words(i) for i in range(6)]))),
        ]

    def test_weights(self, tmp_path: Path) -> None:
        validation = Source(str(write_folder(tmp_path / "other", 2, first=30)))
        data = load(self.sources(tmp_path), validation=validation)
        assert len(data.train) == 8 + 4 + 6
        assert data.samples == 4 + 8 + 6
        assert [part.weight for part in data.train.parts] == [0.5, 2.0, 1.0]
        assert images(data.held_out) == [30, 31]

    def test_every_source_gives_held_out_images(self, tmp_path: Path) -> None:
        data = load(self.sources(tmp_path))
        assert len(data.held_out) >= 3
        assert any(20 <= image < 23 for image in images(data.held_out))

    def test_fingerprint_knows_sources_and_weights(self, tmp_path: Path) -> None:
        sources = self.sources(tmp_path)
        changed = [Source(sources[0].path), *sources[1:]]
        given = [sources, changed, sources[:2], sources[1:]]
        found = [load(some).fingerprint for some in given]
        assert len(set(found)) == 4
        assert load(sources).fingerprint == found[0]

    def test_an_empty_list(self) -> None:
        with pytest.raises(ValueError, match=r"data\.train is an empty list"):
            load([])

    def test_columns_are_those_of_each_source(self, tmp_path: Path) -> None:
        text = str(write_folder(tmp_path / "text", 4, column="text"))
        assert len(load(text, caption_column="text").train) == 3
        assert len(load(Source(text, caption_column="text")).train) == 3
        with pytest.raises(ValueError, match="columns are image, text"):
            load(Source(text), caption_column="text")

    def test_a_source_may_be_used_twice(self, tmp_path: Path) -> None:
        source = Source(str(write_folder(tmp_path / "photos", 8)))
        names = [part.name for part in open_parts(DataArguments([source, source])).train]
        assert names == [source.path, f"{source.path} (2)"]


class TestQuarantine:
    def entry(self, source: str, row: int, caption: int | None = None) -> dict[str, Any]:
        return {"source": source, "row": row, "image": "", "caption": caption, "reason": "bad"}

    def test_left_out(self, tmp_path: Path) -> None:
        path = str(write_folder(tmp_path / "photos", 20))
        before = load(path, holdout=0.25)
        parts = open_parts(DataArguments(path, holdout=0.25))
        train, held_out = parts.train[0], parts.held_out[0]
        bad = [int(train.rows[3]), int(train.rows[9]), int(held_out.rows[0])]
        file = tmp_path / "quarantine.jsonl"
        write_quarantine(file, parts.fingerprint, 20, [self.entry(path, row) for row in bad])
        after = load(path, holdout=0.25, quarantine=str(file))
        assert images(after.train) == [i for i in images(before.train) if i not in bad]
        assert images(after.held_out) == images(before.held_out)[1:]
        assert (after.excluded, after.samples) == (2, 13)
        assert after.fingerprint != before.fingerprint
        # The samples keep the numbers that they have without a quarantine.
        ids = [sample["sample_id"] for sample in after.train]
        assert ids == [i for i in range(15) if i not in (3, 9)]

    def test_a_single_caption(self, tmp_path: Path) -> None:
        names = write_images(tmp_path, 6)
        path = write_coco(tmp_path / "x.json", names, [["a", "b"]] * 6)
        other = str(write_folder(tmp_path / "other", 2, first=30))
        options = {"validation": other}
        parts = open_parts(DataArguments(str(path), **options))
        file = tmp_path / "quarantine.jsonl"
        write_quarantine(file, parts.fingerprint, 12, [self.entry(str(path), 2, 1)])
        data = load(str(path), quarantine=str(file), **options)
        assert data.excluded == 1
        assert images(data.train).count(2) == 1

    def test_an_empty_one_changes_nothing(self, tmp_path: Path) -> None:
        path = str(write_folder(tmp_path / "photos", 10))
        file = tmp_path / "quarantine.jsonl"
        write_quarantine(file, open_parts(DataArguments(path)).fingerprint, 10, [])
        assert load(path, quarantine=str(file)).fingerprint == load(path).fingerprint

    def test_everything(self, tmp_path: Path) -> None:
        path = str(write_folder(tmp_path / "photos", 4))
        file = tmp_path / "quarantine.jsonl"
        entries = [self.entry(path, row) for row in range(4)]
        write_quarantine(file, open_parts(DataArguments(path)).fingerprint, 4, entries)
        with pytest.raises(ValueError, match=r"no captions to learn from in .*photos"):
            load(path, quarantine=str(file))

    def test_of_other_data(self, tmp_path: Path) -> None:
        path, other = (str(write_folder(tmp_path / n, k)) for n, k in (("photos", 4), ("more", 5)))
        file = tmp_path / "quarantine.jsonl"
        write_quarantine(file, open_parts(DataArguments(other)).fingerprint, 4, [])
        with pytest.raises(ValueError, match="is about other data"):
            load(path, quarantine=str(file))


class TestEncoding:
    def test_is_the_same_before_and_after_use(self) -> None:
        processor = processor_with()
        before = _caption_encoding(processor)
        processor.encode_captions(["a small red circle"])
        assert _caption_encoding(processor) == before == _caption_encoding(processor_with())

    def test_knows_what_changes_the_ids(self) -> None:
        other_start, other_text = make_tokenizer(), make_tokenizer()
        other_start.bos_token = "</s>"
        other_text.add_tokens(["circle"])
        found = [_caption_encoding(processor_with()), _caption_encoding(processor_with(50))]
        found += [_caption_encoding(processor_with(tokenizer=t)) for t in (other_start, other_text)]
        assert len(set(found)) == 4

    def test_a_changed_length_is_not_taken_from_the_store(self, tmp_path: Path) -> None:
        arguments = DataArguments(str(write_folder(tmp_path / "photos", 10)))
        long, short = (load_run_data(arguments, processor_with(n)) for n in (77, 4))
        assert long.train.lengths.max() > 4
        assert short.train.lengths.max() == 4
        again = load_run_data(arguments, processor_with(77))
        np.testing.assert_array_equal(again.train.lengths, long.train.lengths)


def test_says_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(write_folder(tmp_path / "photos", 20))
    with caplog.at_level(logging.INFO):
        load(path, holdout=0.25)
    said = f"{path}: 15 captions to learn from, 0 in quarantine; {path}: 5 held out"
    assert said in caplog.text
