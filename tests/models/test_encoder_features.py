"""Features that are kept instead of images: what the plain path gives, in double precision."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hive_vision.models.backbones import backbones_of
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from tests.models.helpers import PATCHES, PREFIX_TOKENS, add_noise, open_cross_attentions
from tests.models.test_image_index import (
    IMAGE_TOKEN,
    assert_equal_gradients,
    batch,
    loss_and_gradients,
    with_copies,
)

CASES = [
    *(("hive", "siglip"), ("cascaded", "siglip"), ("sa", "siglip")),
    *(("hive", "clip"), ("sa", "clip"), ("sa-second-last", "clip")),
]


def make_model(method: str, vision: str, folders: dict[str, Path]) -> PreTrainedModel:
    torch.manual_seed(0)
    pair = folders[vision], folders["llama"]
    model: PreTrainedModel
    if method.startswith("sa"):
        layer = -2 if method == "sa-second-last" else -1
        model = SelfAttentionForConditionalGeneration.from_backbones(*pair, IMAGE_TOKEN, layer)
        add_noise(model, 0.02)
    else:
        fusion: dict[str, Any] = {}
        if method == "cascaded":
            fusion = {"layer_selection": "last", "projector_shared": True}
        model = HiveForConditionalGeneration.from_backbones(*pair, **fusion)
        open_cross_attentions(model)
    backbones_of(model)[0].requires_grad_(False)
    return model.double().train()


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize(("method", "vision"), CASES)
def test_loss_and_gradients_are_those_of_images(
    method: str, vision: str, is_indexed: bool, backbone_folders: dict[str, Path]
) -> None:
    model = make_model(method, vision, backbone_folders)
    inputs = batch(method[:2] if method.startswith("sa") else method)
    if not is_indexed:
        inputs = with_copies(inputs)
    expected_loss, expected = loss_and_gradients(model, inputs)
    with torch.no_grad():
        features = model.encode_images(inputs["pixel_values"])
    layers = 1 if method.startswith(("sa", "cascaded")) else 2
    tokens = PATCHES + (0 if method.startswith("sa") else PREFIX_TOKENS[vision])
    assert features.shape == (len(inputs.pop("pixel_values")), layers, tokens, 32)
    called: list[int] = []
    backbones_of(model)[0].register_forward_pre_hook(lambda *args: called.append(1))
    loss, found = loss_and_gradients(model, {**inputs, "encoder_features": features})
    assert not called
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    assert_equal_gradients(found, expected)
    # Features of others would be seen.
    wrong, _ = loss_and_gradients(model, {**inputs, "encoder_features": features.roll(1, dims=0)})
    right, _ = loss_and_gradients(model, {**inputs, "encoder_features": features})
    assert (wrong - right).abs() > 1e-6


@torch.no_grad()
def test_rounded_features_are_brought_to_the_weights_precision(
    backbone_folders: dict[str, Path],
) -> None:
    for method in ("hive", "sa"):
        model, inputs = make_model(method, "siglip", backbone_folders), batch(method)
        exact = deepcopy(model)(**inputs).logits
        features = model.encode_images(inputs.pop("pixel_values"))
        rounded = features.to(torch.bfloat16)
        found = model(**inputs, encoder_features=rounded).logits
        assert found.dtype == torch.float64
        assert torch.equal(found, model(**inputs, encoder_features=rounded.double()).logits)
        torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)
