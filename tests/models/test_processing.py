"""Images and captions to model inputs."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from hive_vision.models.processing import HiveProcessor, check_vocabulary
from tests.conftest import IMAGE_SIZE, WORDS, make_tokenizer
from tests.models.conftest import MakeHive

PAD, START, END = 0, 1, 2
TOKENIZER = make_tokenizer()


def make_processor(tokenizer: Any = TOKENIZER, **options: Any) -> HiveProcessor:
    return HiveProcessor(transformers.SiglipImageProcessor(), tokenizer, **options)


@pytest.fixture(scope="module")
def processor(backbone_folders: dict[str, Path]) -> HiveProcessor:
    return HiveProcessor.from_backbones(backbone_folders["siglip"], backbone_folders["llama"])


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_captions_stand_between_start_and_end(processor: HiveProcessor) -> None:
    (ids,) = processor.encode_captions(["a small red circle"])
    assert (ids[0], ids[-1]) == (START, END)
    assert ids.count(START) == ids.count(END) == 1
    assert processor.tokenizer.decode(ids[1:-1]).strip() == "a small red circle"


def test_no_and_empty_captions(processor: HiveProcessor) -> None:
    assert processor.encode_captions([]) == []
    assert processor.encode_captions([""]) == [[START, END]]


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40), st.integers(3, 50))
def test_truncation_keeps_the_end_and_the_beginning(words: list[str], limit: int) -> None:
    whole = make_processor(max_text_tokens=1000)
    cut = make_processor(max_text_tokens=limit)
    caption = " ".join(words)
    (long,), (short,) = whole.encode_captions([caption]), cut.encode_captions([caption])
    assert len(short) == min(limit, len(long))
    assert short[-1] == END
    assert short[:-1] == long[: len(short) - 1]


def test_the_papers_limit_is_the_default(processor: HiveProcessor) -> None:
    (ids,) = processor.encode_captions([" ".join(WORDS * 20)])
    assert processor.max_text_tokens == len(ids) == 77


def test_encoding_does_not_leave_truncation_on(processor: HiveProcessor) -> None:
    processor.encode_captions([" ".join(WORDS * 20)])
    assert len(processor.tokenizer(" ".join(WORDS * 20))["input_ids"]) > 77


@pytest.mark.parametrize("limit", [2, 0, -1])
def test_a_limit_without_room_for_text(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_text_tokens is {limit}; it must be at least 3"):
        make_processor(max_text_tokens=limit)


def test_without_bos_the_end_token_starts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    processor = make_processor(tokenizer)
    assert processor.start_token_id == END
    (ids,) = processor.encode_captions(["a circle"])
    assert (ids[0], ids[-1]) == (END, END)


def test_without_eos_captions_could_not_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token, so captions could never end"):
        make_processor(tokenizer)


def test_without_padding_token_the_end_token_pads() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    processor = make_processor(tokenizer)
    batch = processor(text=["a", "a small red circle"])
    assert batch["input_ids"][0, 0] == END
    assert batch["attention_mask"][0].tolist()[:2] == [0, 0]


def test_prompts_are_padded_on_the_left_and_have_no_end(processor: HiveProcessor) -> None:
    prompts = ["a", "a small red circle"]
    batch = processor(images=[picture(0), picture(1)], text=prompts)
    assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    for row, ids in enumerate(processor.encode_captions(prompts)):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == ids[:-1]
        assert (batch["input_ids"][row][~mask] == PAD).all()
        assert mask.tolist() == sorted(mask.tolist()), "padding first"
    assert not batch["attention_mask"][0].all()


def test_images_alone_are_captioned_from_the_start(processor: HiveProcessor) -> None:
    batch = processor(images=[picture(0), picture(1)])
    assert batch["input_ids"].tolist() == [[START], [START]]
    assert batch["attention_mask"].tolist() == [[1], [1]]
    assert processor(images=picture())["input_ids"].tolist() == [[START]]
    assert processor(text="a")["input_ids"].shape[0] == 1


def test_pixels_are_the_image_processors(
    processor: HiveProcessor, backbone_folders: dict[str, Path]
) -> None:
    plain = AutoImageProcessor.from_pretrained(backbone_folders["siglip"])
    expected = plain([picture()], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=[picture()])["pixel_values"], expected)


@pytest.mark.parametrize("options", [{}, {"max_text_tokens": 12}])
def test_round_trip(
    options: dict[str, Any],
    backbone_folders: dict[str, Path],
    fresh_hive: MakeHive,
    tmp_path: Path,
) -> None:
    processor = HiveProcessor.from_backbones(
        backbone_folders["clip"], backbone_folders["llama"], **options
    )
    fresh_hive("clip", "llama").config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    caption = " ".join(WORDS * 20)
    for loaded in (
        AutoProcessor.from_pretrained(tmp_path),
        HiveProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is HiveProcessor
        assert loaded.max_text_tokens == options.get("max_text_tokens", 77)
        assert loaded.encode_captions([caption, "a"]) == processor.encode_captions([caption, "a"])
        ours, theirs = loaded(images=[picture()]), processor(images=[picture()])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_what_the_processor_makes_the_model_reads(
    processor: HiveProcessor, open_hive: MakeHive
) -> None:
    batch = processor(images=[picture(0), picture(1)], text=["a", "a small red"])
    written = open_hive("siglip", "llama").generate(**batch, max_new_tokens=3, min_new_tokens=3)
    assert written.shape == (2, batch["input_ids"].shape[1] + 3)
    assert len(processor.batch_decode(written, skip_special_tokens=True)) == 2


# --- what does not belong together ----------------------------------------------------------


@pytest.mark.parametrize(("tokens", "rows"), [(300, 300), (299, 300), (50257, 50304), (285, 300)])
def test_spare_rows_up_to_five_percent_are_fine(tokens: int, rows: int) -> None:
    check_vocabulary(tokens, rows, "somewhere")


@pytest.mark.parametrize(("tokens", "rows"), [(301, 300), (284, 300), (32000, 50304)])
def test_foreign_tokenizers_are_refused(tokens: int, rows: int) -> None:
    message = (
        f"the tokenizer of 'somewhere' has {tokens} tokens but the embedding has {rows} rows; "
        "use the tokenizer that the language model was trained with"
    )
    with pytest.raises(ValueError, match=message):
        check_vocabulary(tokens, rows, "somewhere")


def test_a_configuration_is_named_by_its_class() -> None:
    with pytest.raises(ValueError, match="the tokenizer of 'LlamaConfig' has"):
        check_vocabulary(2, 1, transformers.LlamaConfig())


def test_folder_with_a_foreign_tokenizer(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(backbone_folders["llama"], tmp_path / "llama")
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has 301 tokens but the embedding has 300 rows"):
        HiveProcessor.from_backbones(backbone_folders["clip"], folder)


def test_folder_without_image_processor(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(backbone_folders["clip"], tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor") as caught:
        HiveProcessor.from_backbones(folder, backbone_folders["llama"])
    assert "\n" not in str(caught.value)


def test_folder_without_tokenizer(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(
        backbone_folders["llama"], tmp_path / "llama", ignore=shutil.ignore_patterns("tokenizer*")
    )
    with pytest.raises(ValueError, match="has no tokenizer: ") as caught:
        HiveProcessor.from_backbones(backbone_folders["clip"], folder)
    assert "\n" not in str(caught.value)
