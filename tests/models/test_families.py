"""Whole families: from two backbones to gradients, folders and back, refusals included."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig

from hive_vision.data.collators import trim_patches
from hive_vision.models.backbones import (
    blank_images,
    capture_block_outputs,
    find_blocks,
    image_token_counts,
    load_config,
    load_vision_model,
    unreached_parameters,
)
from hive_vision.models.export import export_encoder
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from tests.conftest import LANGUAGE_FAMILIES, PATCH_SIZE, VISION_FAMILIES, vision_config
from tests.models.conftest import MakeHive
from tests.models.helpers import add_noise, captions, generator, images

PATCH_VALUES = 3 * PATCH_SIZE**2
FAMILIES = [
    *((vision, "llama") for vision in (*VISION_FAMILIES, "naflex")),
    *(("siglip", language) for language in LANGUAGE_FAMILIES if language != "llama"),
]


def patches(shapes: list[tuple[int, int]], length: int, seed: int = 0) -> dict[str, Tensor]:
    """Images of these many rows and columns of patches, padded to ``length`` with noise."""
    values = torch.randn(len(shapes), length, PATCH_VALUES, generator=generator(seed + 1))
    mask = torch.zeros(len(shapes), length, dtype=torch.long)
    for row, (height, width) in enumerate(shapes):
        source = generator(100 * seed + row)
        values[row, : height * width] = torch.randn(height * width, PATCH_VALUES, generator=source)
        mask[row, : height * width] = 1
    return {
        "pixel_values": values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(shapes),
    }


def inputs_for(vision: str) -> dict[str, Tensor]:
    if vision == "naflex":
        return patches([(2, 3), (4, 4)], length=18)
    return {"pixel_values": images(2)}


@pytest.mark.parametrize(("vision", "language"), FAMILIES)
def test_from_backbones_to_gradients_to_a_folder_and_back(
    vision: str, language: str, open_hive: MakeHive, tmp_path: Path
) -> None:
    model, ids = deepcopy(open_hive(vision, language)).train(), captions(2, 6)
    inputs = {"input_ids": ids, **inputs_for(vision)}
    model(**inputs, labels=ids, return_logits=False).loss.backward()
    blocks = find_blocks(model.vision_model, 8)
    for number in (1, 4, 8):
        gradients = [p.grad for p in blocks[number - 1].parameters()]
        assert all(gradient is not None for gradient in gradients), number
        assert any(gradient.any() for gradient in gradients), number
    without = {n for n, p in model.vision_model.named_parameters() if p.grad is None}
    assert without == unreached_parameters(model.config.vision_config, 8)

    model.eval()
    model.save_pretrained(tmp_path)
    loaded, report = HiveForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        blind = model(ids).logits
    assert (expected - blind).abs().max() > 1e-4


# --- images of any shape ----------------------------------------------------------------------

shape = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=20, deadline=None)
@given(shapes=st.lists(shape, min_size=1, max_size=3), extra=st.integers(0, 5))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_of_images_changes_nothing(
    attention: str, naflex: dict[str, Any], shapes: list[tuple[int, int]], extra: int
) -> None:
    model, ids = naflex[attention], captions(len(shapes), 5)
    longest = max(height * width for height, width in shapes)
    expected = naflex["sdpa"](ids, **patches(shapes, longest)).logits
    padded = model(ids, **patches(shapes, longest + extra, seed=0)).logits
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)
    for row, (height, width) in enumerate(shapes):
        together = {name: values[row : row + 1] for name, values in patches(shapes, 40).items()}
        used = height * width
        alone = {
            "pixel_values": together["pixel_values"][:, :used],
            "pixel_attention_mask": together["pixel_attention_mask"][:, :used],
            "spatial_shapes": together["spatial_shapes"],
        }
        logits = model(ids[row : row + 1], **alone).logits
        torch.testing.assert_close(logits, expected[row : row + 1], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def naflex(open_hive: MakeHive, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same model with either attention."""
    model = open_hive("naflex", "llama")
    folder = tmp_path_factory.mktemp("naflex")
    model.save_pretrained(folder)
    eager = HiveForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return {"sdpa": model, "eager": eager.eval()}


@torch.no_grad()
def test_nobody_looks_at_padding(naflex: dict[str, Any]) -> None:
    model, ids = naflex["sdpa"], captions(2, 5)
    inputs = patches([(2, 3), (4, 4)], length=20)
    output = model(ids, **inputs, output_cross_attentions=True)
    for weights in output.cross_attentions:
        assert weights.shape == (2, 4, 5, 20)
        assert not weights[0, ..., 6:].any()
        assert not weights[1, ..., 16:].any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    torch.testing.assert_close(output.logits, model(ids, **inputs).logits, atol=1e-5, rtol=1e-5)
    features = model.get_image_features(**inputs)
    mask = inputs["pixel_attention_mask"]
    given_features = model(ids, image_features=features, image_features_mask=mask).logits
    assert torch.equal(given_features, model(ids, **inputs).logits)
    assert not torch.allclose(model(ids, image_features=features).logits, given_features)


@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_generation_carries_the_mask(naflex: dict[str, Any], num_beams: int) -> None:
    model, prompts, shapes = naflex["sdpa"], captions(2, 4), [(2, 3), (4, 4)]
    inputs = patches(shapes, 20)
    options: dict[str, Any] = {
        **{"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": num_beams},
        **{"return_dict_in_generate": True, "output_logits": True},
    }
    cached, uncached = (
        model.generate(prompts, **inputs, use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    found = torch.stack(cached.logits, dim=1)
    torch.testing.assert_close(found, torch.stack(uncached.logits, dim=1), atol=1e-5, rtol=1e-5)
    alone = model.generate(prompts[:1], **patches(shapes[:1], 6), **options)
    assert torch.equal(cached.sequences[:1], alone.sequences)
    if num_beams == 1:
        logits = model(cached.sequences[:, :-1], **inputs).logits[:, -5:]
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_what_the_processor_gives_is_what_generate_takes(
    naflex: dict[str, Any], backbone_folders: dict[str, Path]
) -> None:
    processor = HiveProcessor.from_backbones(backbone_folders["naflex"], backbone_folders["llama"])
    picture = Image.effect_noise((20, 40), 80).convert("RGB")
    inputs = processor(images=[picture, picture.resize((24, 24))], text=["a small", "a"])
    assert {"pixel_attention_mask", "spatial_shapes"} < inputs.keys()
    assert naflex["sdpa"].generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[0] == 2


def test_other_attention_cannot_leave_out_padding(naflex: dict[str, Any]) -> None:
    model = deepcopy(naflex["sdpa"])
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="set attn_implementation to sdpa or eager"):
        model(captions(1, 4), **patches([(2, 2)], 6))


@torch.no_grad()
def test_image_processor_collator_and_encoder_agree(
    naflex: dict[str, Any], backbone_folders: dict[str, Path]
) -> None:
    processor = AutoImageProcessor.from_pretrained(backbone_folders["naflex"])
    pictures = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in [(24, 24), (20, 40)]
    ]
    whole = processor(pictures, return_tensors="pt")
    trimmed = trim_patches(whole)
    used = int(whole["pixel_attention_mask"].sum(dim=1).max())
    assert trimmed["pixel_values"].shape == (2, used, PATCH_VALUES)
    assert trimmed["pixel_attention_mask"].shape == (2, used)
    assert whole["pixel_values"].shape == (2, 20, PATCH_VALUES)
    assert used < 20
    ids = captions(2, 5)
    torch.testing.assert_close(
        naflex["sdpa"](ids, **trimmed).logits,
        naflex["sdpa"](ids, **whole).logits,
        atol=1e-5,
        rtol=1e-5,
    )


def test_exported_naflex_is_a_stock_folder(
    naflex: dict[str, Any], backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = naflex["sdpa"].vision_model
    processor = AutoImageProcessor.from_pretrained(backbone_folders["naflex"])
    export_encoder(encoder, processor, tmp_path / "encoder", "# Card\n", {"method": "hive"})
    loaded = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    inputs = patches([(2, 3)], 8)
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state
        assert torch.equal(loaded(**inputs).last_hidden_state, expected)


def test_naflex_tokens_and_tail() -> None:
    config = vision_config("naflex")
    assert image_token_counts(config) == (16, 0)
    tail = {name.split(".")[0] for name in unreached_parameters(config, 8)}
    assert tail == {"head", "post_layernorm"}


# --- dual encoders and timm ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["aimv2", "naflex"])
def test_the_vision_half_of_newer_dual_encoders(family: str, tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9}
    kind = transformers.Aimv2Config if family == "aimv2" else transformers.Siglip2Config
    both = AutoModel.from_config(
        kind(vision_config=vision_config(family, 2).to_dict(), text_config=text)
    )
    both.save_pretrained(tmp_path)
    vision, theirs = load_vision_model(tmp_path), both.vision_model.state_dict()
    assert vision.state_dict().keys() == theirs.keys()
    assert all(torch.equal(w, theirs[name]) for name, w in vision.state_dict().items())


def test_a_folder_as_timm_writes_it(tmp_path: Path, backbone_folders: dict[str, Path]) -> None:
    """timm's own weights have no prefix and a classifier, its config.json no sizes."""
    plain = load_vision_model(backbone_folders["timm"])
    add_noise(plain, 0.1)
    weights = {k: v.clone() for k, v in plain.timm_model.state_dict().items()}
    weights["head.weight"] = torch.zeros(10, 32)
    transformers.AutoConfig.from_pretrained(backbone_folders["timm"]).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_vision_model(tmp_path)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (8, 32)
    assert (model.config.image_size, model.config.patch_size) == ([32, 32], [8, 8])
    with torch.no_grad():
        expected = plain.timm_model.eval().forward_features(images(2))
        assert torch.equal(model.eval()(images(2)).last_hidden_state, expected)


SMALL_TIMM = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_siglip_224", 0),
        ("eva02_tiny_patch14_224", 1),
        ("vit_small_patch16_dinov3", 5),
    ],
)
def test_timm_families(architecture: str, prefix: int, tmp_path: Path) -> None:
    given_config = transformers.TimmWrapperConfig(architecture=architecture, model_args=SMALL_TIMM)
    before = given_config.to_dict()
    config = load_config(given_config, "vision")
    assert given_config.to_dict() == before, "the given one is not changed"
    assert image_token_counts(config) == (16, prefix)
    torch.manual_seed(0)
    model = load_vision_model(given_config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_vision_model(tmp_path).eval()
    with torch.no_grad():
        with capture_block_outputs(find_blocks(model), [1, 2]) as expected:
            model(images(1))
        with capture_block_outputs(find_blocks(loaded), [1, 2]) as found:
            loaded(images(1))
    assert all(torch.equal(found[layer], expected[layer]) for layer in (1, 2))


def test_timm_sizes_without_any_options() -> None:
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    assert blank_images(load_config(config, "vision"))["pixel_values"].shape == (1, 3, 224, 224)


def timm_config(architecture: str) -> PreTrainedConfig:
    return transformers.TimmWrapperConfig(architecture=architecture)


NOT_A_STACK = "is not one stack of equal token grids .* only plain vision transformers"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.SwinConfig(
                image_size=32,
                patch_size=2,
                window_size=4,
                embed_dim=8,
                depths=[1] * 3,
                num_heads=[2] * 3,
            ),
            NOT_A_STACK,
        ),
        (transformers.SwinConfig(image_size=30), r"\(a blank image fails: .*\); only plain"),
        (transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4), NOT_A_STACK),
        (transformers.ResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4), NOT_A_STACK),
        (timm_config("resnet18"), "'resnet18' " + NOT_A_STACK),
        (timm_config("convnext_atto"), "'convnext_atto' " + NOT_A_STACK),
        (timm_config("swin_tiny_patch4_window7_224"), r"\(14, 14, 384\)"),
        (timm_config("hiera_tiny_224"), "'hiera_tiny_224' " + NOT_A_STACK),
        (timm_config("vit_enormous"), "has no architecture 'vit_enormous'; a newer one may"),
    ],
    ids=lambda value: getattr(value, "architecture", getattr(value, "model_type", "")),
)
def test_encoders_without_equal_token_grids_are_refused(
    config: PreTrainedConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_vision_model(config)
    assert "\n" not in str(caught.value)
