"""What a model reads, for every kind of encoder; and that looking leaves no trace."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from hive_vision.analysis.gradient_flow import gradient_flow
from hive_vision.analysis.inspection import InspectedModel, find_model, undisturbed
from hive_vision.analysis.maps import attention_maps, gradient_maps
from hive_vision.models.processing import HiveProcessor
from tests.analysis.conftest import Inspect
from tests.analysis.helpers import CAPTION, make_model, picture, prepared
from tests.conftest import text_config, vision_config
from tests.models.helpers import PREFIX_TOKENS

SHORTER = ["a", "a small red", "a small red circle", CAPTION]
FAMILIES = [*PREFIX_TOKENS, "naflex"]


@pytest.mark.parametrize("vision", FAMILIES)
def test_grid_prefix_and_image_of_every_encoder(inspected: Inspect, vision: str) -> None:
    model = inspected("hive", vision)
    sample = model.prepare(picture(), CAPTION)
    tokens = PREFIX_TOKENS.get(vision, 0) + 16
    if vision == "naflex":  # 32 x 40 pixels; the image is cut into patches as it is
        assert sample.grid == (5, 4)
        assert model.prefix(99, sample.grid) == 0
        assert sample.image.size == (32, 40)
        return
    assert sample.grid == (4, 4)
    assert model.prefix(tokens, sample.grid) == tokens - 16
    assert sample.image.size == (32, 32)
    values = torch.arange(-(tokens - 16.0), 16.0).expand(2, -1)
    assert np.array_equal(model.patches(values, (4, 4)), [np.arange(16).reshape(4, 4)] * 2)


def test_the_image_is_the_one_seen(inspected: Inspect) -> None:
    image = picture(height=32)
    seen = inspected("hive", "siglip").prepare(image, CAPTION).image
    assert np.abs(np.asarray(seen, int) - np.asarray(image, int)).max() <= 1
    stretched = np.asarray(inspected("hive", "timm").prepare(image, CAPTION).image, float)
    likeness = np.corrcoef(stretched.ravel(), np.asarray(image, float).ravel())[0, 1]
    assert likeness > 0.999


@pytest.mark.parametrize(("method", "vision", "count"), [("hive", "clip", 0), ("sa", "clip", 16)])
def test_tokens_have_their_place_and_their_words(
    inspected: Inspect, method: str, vision: str, count: int
) -> None:
    model = inspected(method, vision)
    sample = model.prepare(picture(), CAPTION)
    ids = sample.inputs["input_ids"][0]
    decode = model.processor.tokenizer.decode
    assert sample.tokens == ("<s>", *CAPTION.split(), "</s>")
    assert tuple(decode([ids[place]]).strip() for place in sample.places) == sample.tokens
    assert len(ids) == len(sample.tokens) + count
    assert [CAPTION[a:b].strip() for a, b in sample.spans] == ["", *CAPTION.split(), ""]
    assert (sample.inputs["labels"][0] != -100).sum() == len(sample.tokens) - 1


def test_a_long_caption_is_cut_with_its_spans(inspected: Inspect) -> None:
    model = inspected("hive")
    short = HiveProcessor(model.processor.image_processor, model.processor.tokenizer, 5)
    sample = InspectedModel(model.model, short).prepare(picture(), CAPTION)
    assert sample.tokens == ("<s>", "a", "small", "red", "</s>")
    assert len(sample.spans) == len(sample.places) == 5
    left_out = [InspectedModel(model.model, short).tokens_left_out(text) for text in SHORTER]
    assert left_out == [0, 0, 1, len(CAPTION.split()) - 3]


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_loading(inspected: Inspect, method: str, tmp_path: Path) -> None:
    model = inspected(method)
    expected = gradient_maps(model, model.prepare(picture(), CAPTION)).norms
    for folder in (tmp_path, tmp_path / "stage2" / "model"):
        model.model.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        found = InspectedModel.from_folder(tmp_path)
        assert type(found.model) is type(model.model)
        assert not found.model.training
        norms = gradient_maps(found, found.prepare(picture(), CAPTION)).norms
        assert np.array_equal(norms, expected)
    with pytest.raises(ValueError, match="give a run that has finished stage3"):
        InspectedModel.from_folder(tmp_path, "stage3")


def test_which_of_a_runs_models(inspected: Inspect, tmp_path: Path) -> None:
    model = inspected("hive")
    for number, place in enumerate(("stage1/model", "stage2/model", "model", "stage3/model")):
        folder = tmp_path / place
        copy = deepcopy(model.model)
        copy.projectors[0].requires_grad_(False)
        next(copy.projectors[0].parameters()).fill_(number)
        copy.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        found = InspectedModel.from_folder(tmp_path).model
        assert next(found.projectors[0].parameters()).unique().tolist() == [number], place
    first = InspectedModel.from_folder(tmp_path, "stage1").model
    assert not next(first.projectors[0].parameters()).any()


def test_a_stock_llava_folder(inspected: Inspect, tmp_path: Path) -> None:
    ours = inspected("sa")
    processor = LlavaProcessor(ours.processor.image_processor, ours.processor.tokenizer, 8)
    ours.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path)
    found = InspectedModel.from_folder(tmp_path)
    for model in (found, ours):
        sample = model.prepare(picture(), CAPTION)
        norms = gradient_maps(model, sample).norms
        assert norms.shape == (8, 4, 4)
    assert np.array_equal(norms, gradient_maps(found, sample).norms)


def test_what_cannot_be_looked_into(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a clip_vision_model model; maps are of models that"):
        InspectedModel.from_folder(backbone_folders["clip"])
    with pytest.raises(ValueError, match="holds no model; give a run of hive-vision pretrain"):
        InspectedModel.from_folder(tmp_path)


def test_what_a_folder_without_a_model_is(inspected: Inspect, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    (run / "stage1").mkdir(parents=True)
    (run / "recipe.yaml").write_text("method: hive")
    with pytest.raises(ValueError, match=r"has not finished any stage \(finished: none\)"):
        find_model(run)
    model = inspected("hive")
    model.model.save_pretrained(run / "stage1" / "model")
    assert find_model(run) == run / "stage1" / "model"
    with pytest.raises(ValueError, match=r"has not finished stage2 \(finished: stage1\)"):
        find_model(run, "stage2")
    for folder in (run.parent, tmp_path):
        with pytest.raises(ValueError, match=r"is not a run but a folder of 1; .*runs/x'"):
            find_model(folder)


# --- looking changes nothing ------------------------------------------------------------------


def trained(method: str, folders: dict[str, Path]) -> InspectedModel:
    """In the middle of training: dropout, frozen parts, one block not in training, gradients."""
    vision, language = vision_config("clip"), text_config("opt" if method == "hive" else "neox")
    vision.attention_dropout = 0.2
    for name in ("dropout", "attention_dropout", "hidden_dropout"):
        setattr(language, name, 0.2)
    model = make_model(method, vision, language)
    processor = HiveProcessor.from_backbones(folders["clip"], folders["opt"])
    found = InspectedModel(model.train(), processor)
    found.blocks[2].eval()
    found.blocks[5].requires_grad_(False)
    found.language.requires_grad_(False)
    sample = found.prepare(picture(9), CAPTION)
    # Asked for attention once, transformers leaves idle listeners of its own on the layers.
    model(**sample.inputs, output_attentions=True)
    found.loss(sample).backward()
    found.blocks[1].zero_grad(set_to_none=True)
    return found


def facts(model: PreTrainedModel) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "weights": {name: value.detach().clone() for name, value in tensors.items()},
        "gradients": {
            name: None if weight.grad is None else weight.grad.clone()
            for name, weight in model.named_parameters()
        },
        "needed": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attention": [
            part.config._attn_implementation
            for part in model.modules()
            if isinstance(part, PreTrainedModel)
        ],
        "random": [torch.get_rng_state(), *np.random.get_state()[1:3], random.getstate()],
    }


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list):
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where}.{number}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_looking_changes_nothing(method: str, backbone_folders: dict[str, Path]) -> None:
    model = trained(method, backbone_folders)
    sample = model.prepare(picture(), CAPTION)
    twin, before = deepcopy(model.model), facts(model.model)
    for weight, copied in zip(model.model.parameters(), twin.parameters(), strict=True):
        copied.grad = None if weight.grad is None else weight.grad.clone()
    found = gradient_maps(model, sample).norms
    attention_maps(model, sample)
    gradient_flow(model, prepared(model, 2))
    finished = InspectedModel(deepcopy(model.model).eval(), model.processor)
    assert np.array_equal(found, gradient_maps(finished, sample).norms), "no dropout"
    with torch.no_grad():
        gradient_maps(model, sample)
    assert_same(facts(model.model), before)
    state = torch.get_rng_state()
    loss = model.model(**sample.inputs).loss
    loss.backward()
    after = facts(model.model)
    torch.set_rng_state(state)
    other = twin(**sample.inputs).loss
    other.backward()
    assert torch.equal(loss, other)
    assert_same(after["gradients"], facts(twin)["gradients"])
    assert not torch.equal(loss, twin(**sample.inputs).loss), "dropout must be active"


def test_what_happens_undisturbed_draws_no_random_numbers(inspected: Inspect) -> None:
    before = torch.get_rng_state()
    with undisturbed(inspected("hive").model):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_nor_does_looking_that_fails(method: str, backbone_folders: dict[str, Path]) -> None:
    model = trained(method, backbone_folders)
    sample = model.prepare(picture(), CAPTION)
    sample.inputs["input_ids"][0, -1] = 10**6
    before = facts(model.model)
    for look in (gradient_maps, attention_maps):
        with pytest.raises(IndexError):
            look(model, sample)
        assert_same(facts(model.model), before)
