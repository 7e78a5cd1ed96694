"""Loading backbones and finding their parts by structure."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from hive_vision.models.backbones import (
    backbones_of,
    blank_images,
    capture_block_outputs,
    find_blocks,
    hash_tensors,
    image_token_counts,
    load_config,
    load_language_model,
    load_vision_model,
    unreached_parameters,
)
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from tests.conftest import LANGUAGE_FAMILIES, VISION_FAMILIES, text_config, vision_config
from tests.models.helpers import WITH_HIDDEN_STATES, images

WEIGHTS = "model.safetensors"


# --- loading --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_encoder_loads_bit_for_bit(family: str, backbone_folders: dict[str, Path]) -> None:
    plain = AutoModel.from_pretrained(backbone_folders[family])
    for source in (backbone_folders[family], str(backbone_folders[family])):
        loaded = load_vision_model(source)
        assert type(loaded) is type(plain)
        assert loaded.dtype == torch.float32
        _assert_same_weights(loaded, plain)


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_language_model_loads_bit_for_bit(family: str, backbone_folders: dict[str, Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(backbone_folders[family])
    loaded = load_language_model(backbone_folders[family])
    assert type(loaded) is type(plain)
    _assert_same_weights(loaded, plain)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_a_dual_encoder_the_vision_half_is_taken(family: str, tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9}
    parts = {"vision_config": vision_config(family).to_dict(), "text_config": text}
    config = (
        transformers.CLIPConfig(**parts) if family == "clip" else transformers.SiglipConfig(**parts)
    )
    both = AutoModel.from_config(config)
    both.save_pretrained(tmp_path)
    vision = load_vision_model(tmp_path)
    assert type(vision) is type(AutoModel.from_config(vision_config(family)))
    half = both.vision_model
    keys = {name.removeprefix("vision_model.") for name in half.state_dict()}
    assert {name.removeprefix("vision_model.") for name in vision.state_dict()} == keys
    for (_, ours), (_, theirs) in zip(
        sorted(vision.state_dict().items()), sorted(half.state_dict().items()), strict=True
    ):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        expected = half.eval()(images(2)).last_hidden_state
        assert torch.equal(vision.eval()(images(2)).last_hidden_state, expected)
    assert load_config(config, "vision").model_type == vision.config.model_type


@pytest.mark.parametrize("load", [load_vision_model, load_language_model])
def test_half_precision_configurations_are_made_in_float32(load: Any) -> None:
    """As their checkpoints are loaded: what a plan says holds for the run."""
    config = vision_config("siglip") if load is load_vision_model else text_config("llama")
    config.dtype = torch.bfloat16
    assert {parameter.dtype for parameter in load(config).parameters()} == {torch.float32}


def test_half_precision_checkpoints_are_loaded_in_float32(tmp_path: Path) -> None:
    AutoModel.from_config(vision_config("vit", 1)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_vision_model(tmp_path).dtype == torch.float32


def test_configurations_make_random_models() -> None:
    assert isinstance(load_vision_model(vision_config("vit", 2)), transformers.ViTModel)
    assert isinstance(load_language_model(text_config("opt", 2)), transformers.OPTForCausalLM)


@pytest.mark.parametrize("role", ["vision", "language"])
def test_folder_without_config(role: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{role} backbone .* has no config.json; give a Hugging"):
        load_config(tmp_path, role)


@pytest.mark.parametrize("text", ["{not json", '{"model_type": "nonsense"}'])
def test_folder_with_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"vision backbone .* is neither a model folder") as caught:
        load_config(tmp_path, "vision")
    assert "\n" not in str(caught.value)


def test_name_that_cannot_be_reached() -> None:
    message = "language backbone 'nobody/nothing' is neither a model folder nor a reachable hub id"
    with pytest.raises(ValueError, match=message) as caught:
        load_language_model("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("clip", ["encoder.layers.3.mlp.fc1.weight", "encoder.layers.5.mlp.fc1.weight"]),
        ("llama", ["model.layers.1.mlp.up_proj.weight"]),
    ],
)
def test_missing_weights_are_an_error_that_names_the_first(
    family: str, lost: list[str], backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(backbone_folders[family], tmp_path / "broken")
    weights = load_file(folder / WEIGHTS)
    for name in lost:
        del weights[name]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    load = load_vision_model if family in VISION_FAMILIES else load_language_model
    with pytest.raises(
        ValueError, match=rf"lacks {len(lost)} weights .* expected {', '.join(lost)}"
    ):
        load(folder)


def test_weights_of_another_shape_are_an_error_that_names_the_first(
    backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(backbone_folders["clip"], tmp_path / "wider")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] += 16
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"has 24 weights of another shape .*bias: expected \(80,\), found \(64,\)"
    ):
        load_vision_model(folder)


def test_folder_without_weights(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(backbone_folders["llama"], tmp_path / "empty")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"language backbone .* no file named model\.safetensors"):
        load_language_model(folder)


# --- blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*VISION_FAMILIES, *LANGUAGE_FAMILIES])
@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_are_found(family: str, depth: int) -> None:
    with torch.device("meta"):
        if family in VISION_FAMILIES:
            model = AutoModel.from_config(vision_config(family, depth))
        else:
            model = AutoModelForCausalLM.from_config(text_config(family, depth))
    blocks = find_blocks(model, depth)
    assert len(blocks) == depth
    assert sum("attn" in n or "attention" in n for n, _ in blocks[0].named_children()) >= 1


def _stack(depth: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(depth))


def test_no_stack_of_that_depth() -> None:
    message = "ModuleDict should have exactly one stack of 4 equal blocks; found: none"
    with pytest.raises(ValueError, match=message):
        find_blocks(nn.ModuleDict({"encoder": _stack(3)}), 4)


def test_two_stacks_are_named() -> None:
    model = nn.ModuleDict({"local": _stack(3), "wide": _stack(3)})
    with pytest.raises(ValueError, match=r"found: local, wide\. Only plain transformer stacks"):
        find_blocks(model, 3)


def test_lists_inside_a_block_and_of_unlike_modules_are_not_stacks() -> None:
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(2, 2), nn.GELU()), "blocks": _stack(2)})
    assert find_blocks(model, 2) is model["blocks"]


def test_without_a_number_the_longest_stack_is_meant() -> None:
    model = nn.ModuleDict({"stem": _stack(2), "blocks": _stack(3)})
    assert find_blocks(model) is model["blocks"]
    with pytest.raises(ValueError, match="one stack of 3 equal blocks; found: blocks, more"):
        find_blocks(nn.ModuleDict({"blocks": _stack(3), "stem": _stack(2), "more": _stack(3)}))


@pytest.mark.parametrize("family", WITH_HIDDEN_STATES)
@torch.no_grad()
def test_captured_outputs_are_the_hidden_states(
    family: str, backbone_folders: dict[str, Path]
) -> None:
    model = AutoModel.from_pretrained(backbone_folders[family]).eval()
    blocks = find_blocks(model, 8)
    with capture_block_outputs(blocks, [1, 4, 8, 8]) as outputs:
        expected = model(images(2), output_hidden_states=True).hidden_states
    assert sorted(outputs) == [1, 4, 8]
    for layer, features in outputs.items():
        assert torch.equal(features, expected[layer])
        assert not torch.equal(features, expected[layer - 1])


def test_capture_ends_with_the_block_even_after_an_error() -> None:
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    captured: dict[int, torch.Tensor] = {}

    def fail_inside() -> None:
        nonlocal captured
        with capture_block_outputs(blocks, [2]) as captured:
            blocks[1](torch.zeros(1, 2))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_inside()
    first = captured[2]
    blocks[1](torch.ones(1, 2))
    assert captured[2] is first


# --- token counts and unreached parameters --------------------------------------------------


REGISTERS = transformers.Dinov2WithRegistersConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    num_register_tokens=4,
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (vision_config("clip", 1), (16, 1)),
        (vision_config("siglip", 1), (16, 0)),
        (vision_config("dinov2", 1), (16, 1)),
        (vision_config("vit", 1), (16, 1)),
        (REGISTERS, (16, 5)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_token_counts(config: PreTrainedConfig, expected: tuple[int, int]) -> None:
    assert image_token_counts(config) == expected
    blocks = find_blocks(model := load_vision_model(config), config.num_hidden_layers)
    with torch.no_grad(), capture_block_outputs(blocks, [1]) as outputs:
        model(**blank_images(config))
    assert outputs[1].shape == (1, sum(expected), 32)


def test_images_need_not_be_square() -> None:
    config = vision_config("vit", 1)
    config.image_size, config.patch_size = (16, 32), (8, 4)
    assert blank_images(config)["pixel_values"].shape == (1, 3, 16, 32)
    assert image_token_counts(config) == (2 * 8, 1)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("deepest", [8, 5])
def test_unreached_parameters_are_those_without_gradient(
    family: str, deepest: int, backbone_folders: dict[str, Path]
) -> None:
    model = load_vision_model(backbone_folders[family]).train()
    with capture_block_outputs(find_blocks(model, 8), [2, deepest]) as outputs:
        model(images(2))
    sum(features.square().sum() for features in outputs.values()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unreached_parameters(model.config, deepest) == without
    later = {n for n in without if any(f".{i}." in f".{n}" for i in range(deepest, 8))}
    assert bool(later) == (deepest < 8)
    blocks = {id(p) for block in find_blocks(model, 8)[:deepest] for p in block.parameters()}
    assert not any(id(p) in blocks for n, p in model.named_parameters() if n in without)


def test_siglips_tail_is_its_post_norm_and_head() -> None:
    names = unreached_parameters(vision_config("siglip"), 8)
    assert {name.split(".")[0] for name in names} == {"head", "post_layernorm"}


def test_asking_does_not_change_the_configuration(backbone_folders: dict[str, Path]) -> None:
    config = load_config(backbone_folders["clip"], "vision")
    before = json.dumps(config.to_dict(), default=str)
    image_token_counts(config)
    unreached_parameters(config, 4)
    assert json.dumps(config.to_dict(), default=str) == before


def _assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())


def test_hashes_tell_tensors_apart():
    tensors = {"a": torch.zeros(2), "b": torch.tensor(0.0), "c": torch.zeros(2, dtype=torch.int32)}
    hashes = hash_tensors(tensors)
    assert list(hashes) == ["a", "b", "c"]
    assert hashes["a"] == hash_tensors({"a": torch.zeros(2)}, ["a"])["a"]
    assert hashes["a"] != hash_tensors({"a": torch.tensor([0.0, 1e-30])})["a"]
    assert (
        hash_tensors({"a": torch.arange(4).reshape(2, 2).T})["a"]
        == (hash_tensors({"a": torch.tensor([[0, 2], [1, 3]])})["a"])
    ), "the values count, not how they lie in memory"


def test_backbones_of_both_kinds_of_models() -> None:
    parts = vision_config("clip"), text_config("llama")
    hive = HiveForConditionalGeneration.from_backbones(*parts)
    sa = SelfAttentionForConditionalGeneration.from_backbones(*parts, image_token_id=3)
    assert backbones_of(hive) == (hive.vision_model, hive.language_model)
    assert backbones_of(sa) == (sa.model.vision_tower, sa.model.language_model)
