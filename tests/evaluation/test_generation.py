"""Captions and answers equal those of transformers' own calls."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hive_vision.evaluation.generation import write_answer, write_captions
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.models.vlm import VlmInputs, export_vlm


@pytest.fixture(scope="module")
def run(backbone_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, the second with other weights."""
    folder = tmp_path_factory.mktemp("run")
    backbones = backbone_folders["siglip"], backbone_folders["llama"]
    for stage in ("stage1", "stage2"):
        torch.manual_seed(len(list(folder.iterdir())))
        model = HiveForConditionalGeneration.from_backbones(*backbones)
        for block in model.cross_attentions:
            torch.nn.init.normal_(block.o_proj.weight)
        model.save_pretrained(folder / stage / "model")
        HiveProcessor.from_backbones(*backbones).save_pretrained(folder / stage / "model")
    return folder


@pytest.fixture(scope="module")
def vlm(backbone_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    backbones = backbone_folders["siglip"], backbone_folders["llama"]
    inputs = VlmInputs.from_backbones(*backbones, "llava")
    model = SelfAttentionForConditionalGeneration.from_backbones(
        *backbones, image_token_id=inputs.form.image_token_id
    )
    export_vlm(model, inputs, folder / "model", "# card", {})
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        Image.new("RGB", (30, 20), path.stem).save(path)
    return [str(path) for path in paths]


def test_captions_of_the_last_stage(run: Path, photos: list[str]) -> None:
    folder = run / "stage2" / "model"
    model = HiveForConditionalGeneration.from_pretrained(folder)
    processor = HiveProcessor.from_pretrained(folder)
    images = [Image.open(photo) for photo in photos]
    written = model.generate(**processor(images=images), max_new_tokens=6, do_sample=False)
    expected = [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    assert write_captions(str(run), photos, 6) == expected
    assert write_captions(str(folder), photos[:1], 6) == expected[:1]
    assert write_captions(str(run / "stage1" / "model"), photos, 6) != expected


def test_answers(vlm: Path, photos: list[str]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(vlm / "model")
    processor = AutoProcessor.from_pretrained(vlm / "model")
    text = "USER: <image>\nwhat? ASSISTANT:"
    inputs = processor(images=Image.open(photos[0]), text=text, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = processor.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for folder in (vlm, vlm / "model"):
        assert write_answer(str(folder), photos[0], "what?", 5) == expected.strip()


def test_models_of_the_other_kind(run: Path, vlm: Path, photos: list[str]) -> None:
    with pytest.raises(ValueError, match="is a llava model; captions are written by models of"):
        write_captions(str(vlm / "model"), photos, 5)
    with pytest.raises(
        ValueError, match="is a hive_vision model; questions are answered by models of"
    ):
        write_answer(str(run / "stage1" / "model"), photos[0], "what?", 5)


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png' cannot be read: it does not exist"):
        write_captions(str(run), [str(tmp_path / "gone.png")], 5)
    with pytest.raises(ValueError, match="holds no model; give a run of hive-vision pretrain"):
        write_captions(str(tmp_path), ["x.png"], 5)
    with pytest.raises(ValueError, match="holds no model; give a run of hive-vision finetune"):
        write_answer(str(tmp_path), "x.png", "what?", 5)
