"""An image that is encoded once for its captions: what a copy of it for each caption gives."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hive_vision.models.backbones import backbones_of
from hive_vision.models.cross_attention import rows_of_images
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from tests.models.conftest import MakeHive
from tests.models.helpers import (
    PATCHES,
    PREFIX_TOKENS,
    add_noise,
    captions,
    generator,
    images,
    open_cross_attentions,
)

IMAGE_TOKEN = 3
INDEX = [0, 0, 0, 2, 2, 1, 0]  # not sorted, and captions of an image are not all neighbours
METHODS = ["hive", "cascaded", "sa"]
MakeModel = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module")
def make_model(backbone_folders: dict[str, Path]) -> MakeModel:
    """Models in double precision by method, with weights that let the image matter."""

    @cache
    def make(method: str) -> PreTrainedModel:
        torch.manual_seed(0)
        folders = backbone_folders["siglip"], backbone_folders["llama"]
        if method == "sa":
            sa = SelfAttentionForConditionalGeneration.from_backbones(*folders, IMAGE_TOKEN)
            add_noise(sa, 0.02)
            return sa.double().eval()
        fusion: dict[str, Any] = {"cross_attention_qk_norm": True}
        if method == "cascaded":
            fusion |= {"layer_selection": "last", "projector_shared": True}
        model = HiveForConditionalGeneration.from_backbones(*folders, **fusion)
        open_cross_attentions(model)
        return model.double().eval()

    return make


def batch(method: str) -> dict[str, Tensor]:
    """Seven captions, some of them padded, of three images."""
    ids, start = captions(len(INDEX), 6), torch.ones(len(INDEX), 1).long()
    count = PATCHES + PREFIX_TOKENS["siglip"] if method == "sa" else 0
    ids = torch.cat([start, torch.full((len(INDEX), count), IMAGE_TOKEN), ids], dim=1)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[::2, -2:] = 0
    labels[mask == 0] = -100
    labels[:, : 1 + count] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": images(3).double(),
        "image_index": torch.tensor(INDEX),
    }


def with_copies(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain path: every caption has an image of its own."""
    plain = {name: value for name, value in inputs.items() if name != "image_index"}
    for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes"):
        if name in plain:
            plain[name] = plain[name][inputs["image_index"]]
    return plain


def loss_and_gradients(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs, return_logits=False, num_items_in_batch=30).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_equal_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-12
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        difference = float((gradient - expected[name]).abs().max())
        assert difference <= atol + 1e-10 * float(expected[name].abs().max()), name


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_copies(
    method: str, is_frozen: bool, is_checkpointed: bool, make_model: MakeModel
) -> None:
    model, inputs = deepcopy(make_model(method)).train(), batch(method)
    vision, _ = backbones_of(model)
    vision.requires_grad_(not is_frozen)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    loss, found = loss_and_gradients(model, inputs)
    expected_loss, expected = loss_and_gradients(model, with_copies(inputs))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    assert_equal_gradients(found, expected)
    assert is_frozen != any(p.grad is not None for p in vision.parameters())
    # Another caption's image would be seen.
    wrong = {**inputs, "image_index": inputs["image_index"].roll(1)}
    assert (model(**wrong, return_logits=False).loss - loss).abs() > 1e-6


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_what_sees_no_text_runs_once_for_an_image(method: str, make_model: MakeModel) -> None:
    model = deepcopy(make_model(method))
    vision, _ = backbones_of(model)
    seen: dict[str, set[int]] = {}

    def listen(name: str, module: nn.Module) -> None:
        module.register_forward_hook(
            lambda module, args, output: seen.setdefault(name, set()).add(len(args[0]))
        )

    listen("patches", vision.embeddings.patch_embedding)
    for block in vision.encoder.layers:
        listen("block", block)
    if method == "sa":
        listen("connector", model.model.multi_modal_projector.linear_1)
    else:
        for projector in model.projectors:
            listen("projector", projector)
        for block in model.cross_attentions:
            for name in ("q_proj", "k_proj", "v_proj"):
                listen(name, getattr(block, name))
    output = model(**batch(method))
    assert seen.pop("q_proj", {7}) == {7}
    assert len(seen) >= 3
    assert set.union(*seen.values()) == {3}
    assert len(output.logits) == 7


@pytest.mark.parametrize("method", ["hive", "cascaded"])
@torch.no_grad()
def test_eager_attention_and_its_weights(method: str, make_model: MakeModel) -> None:
    model, inputs = deepcopy(make_model(method)), batch(method)
    expected = model(**with_copies(inputs), output_cross_attentions=True)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        found = model(**inputs, output_cross_attentions=True)
        torch.testing.assert_close(model(**inputs).logits, expected.logits)
        torch.testing.assert_close(found.logits, expected.logits)
        assert len(found.cross_attentions) == len(expected.cross_attentions) > 0
        for weights, wanted in zip(found.cross_attentions, expected.cross_attentions, strict=True):
            assert weights.shape[0] == 7
            torch.testing.assert_close(weights, wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_images_of_any_shape_keep_their_masks(attention: str, open_hive: MakeHive) -> None:
    model = deepcopy(open_hive("naflex", "llama")).double()
    model.set_attn_implementation(attention)
    shapes = torch.tensor([[4, 4], [2, 3], [1, 5]])
    mask = (torch.arange(16) < shapes.prod(dim=1)[:, None]).long()
    patches = torch.randn(3, 16, 3 * 8 * 8, generator=generator(5)).double()
    inputs = {
        **batch("hive"),
        "pixel_values": patches,
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }
    loss, found = loss_and_gradients(model, inputs)
    expected_loss, expected = loss_and_gradients(model, with_copies(inputs))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    # The encoder brings its position embeddings to an image's shape in single precision.
    assert_equal_gradients(found, expected, atol=1e-8)
    changed = {**inputs, "pixel_values": patches + 9 * (1 - mask[..., None])}
    torch.testing.assert_close(loss_and_gradients(model, changed)[0], loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_features_that_are_given(make_model: MakeModel) -> None:
    model, inputs = make_model("hive"), batch("hive")
    expected = model(**inputs).logits
    features = model.get_image_features(inputs.pop("pixel_values"))
    assert torch.equal(model(**inputs, image_features=features).logits, expected)


def test_an_index_for_other_captions_is_refused(make_model: MakeModel) -> None:
    inputs = batch("hive")
    with pytest.raises(ValueError, match="4 images for 7 captions; give one for each") as failure:
        make_model("hive")(**{**inputs, "image_index": inputs["image_index"][:4]})
    assert "\n" not in str(failure.value)
    inputs.pop("image_index")
    with pytest.raises(ValueError, match=r"3 images for 7 captions; .*, or image_index"):
        make_model("hive")(**inputs)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
def test_rows_of_images_is_indexing(shape: tuple[int, ...]) -> None:
    states = torch.randn(3, *shape, dtype=torch.float64, generator=generator(0))
    states.requires_grad_(True)
    index = torch.tensor(INDEX)
    assert torch.equal(rows_of_images(states, index), states[index])
    assert torch.autograd.gradcheck(lambda x: rows_of_images(x, index), states)
