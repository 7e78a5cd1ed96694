"""Maps: gradients against finite differences, attention against the models' own."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from hive_vision.analysis.inspection import InspectedModel, Sample
from hive_vision.analysis.maps import AttentionMaps, attention_maps, gradient_maps
from hive_vision.models.backbones import find_blocks
from tests.analysis.conftest import Inspect
from tests.analysis.helpers import CAPTION, picture
from tests.models.helpers import PREFIX_TOKENS

EPSILON = 1e-5
# Language models without steps in single precision, so that finite differences can be exact.
EXACT = [
    ("hive", "clip", "opt", -1),
    ("hive", "siglip", "gpt2", -1),
    ("hive", "naflex", "opt", -1),
    ("cascaded", "dinov3", "neox", -1),
    ("sa", "clip", "neox", -1),
    ("sa", "siglip", "neox", -2),
    ("sa", "dinov3", "neox", -1),
]


def finite_differences(
    model: InspectedModel, sample: Sample, layer: int, tokens: slice
) -> np.ndarray:
    """Derivatives of the loss along each channel of chosen tokens of F_layer, (tokens, D).

    Every one is a row of a batch; nothing here calls what is tested.
    """
    block = find_blocks(model.vision)[layer - 1]
    width = model.model.config.vision_config.hidden_size
    count = (tokens.stop - tokens.start) * width
    inputs = {name: torch.cat([value] * 2 * count) for name, value in sample.inputs.items()}
    labels = inputs.pop("labels")[:, 1:]

    def shift(module: nn.Module, args: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        change = torch.zeros_like(hidden)
        steps = EPSILON * torch.eye(count, dtype=hidden.dtype)
        change[:, tokens] = torch.cat([steps, -steps]).view(2 * count, -1, width)
        return (hidden + change, *output[1:]) if isinstance(output, tuple) else hidden + change

    handle = block.register_forward_hook(shift, prepend=True)
    with torch.no_grad():
        logits = model.model(**inputs).logits[:, :-1]
    handle.remove()
    assert logits.dtype == torch.float64
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1)
    up, down = (losses / (labels[0] != -100).sum()).chunk(2)
    return ((up - down) / (2 * EPSILON)).view(-1, width).numpy()


@pytest.mark.parametrize(("method", "vision", "language", "feature_layer"), EXACT)
def test_gradient_maps_are_finite_differences(
    inspected: Inspect, method: str, vision: str, language: str, feature_layer: int
) -> None:
    model = inspected(method, vision, language, feature_layer)
    model = InspectedModel(deepcopy(model.model).double(), model.processor)
    sample = model.prepare(picture(), CAPTION)
    maps = gradient_maps(model, sample)
    rows, columns = (5, 4) if vision == "naflex" else (4, 4)
    prefix = PREFIX_TOKENS.get(vision, 0)
    assert maps.norms.shape == (8, rows, columns)
    assert maps.loss == pytest.approx(float(model.model(**sample.inputs).loss), rel=1e-6)
    for layer, row, column in ((1, 0, 1), (4, 1, 3), (7, rows - 1, 2)):
        place = prefix + row * columns + column
        found = finite_differences(model, sample, layer, slice(place, place + 1))
        expected = np.linalg.norm(found)
        assert expected > 1e-6
        assert maps.norms[layer - 1, row, column] == pytest.approx(expected, rel=1e-6)
    if prefix:
        expected = np.linalg.norm(finite_differences(model, sample, 3, slice(0, prefix)))
        assert maps.prefix[2] == pytest.approx(expected, rel=1e-6)
    else:
        assert not np.nan_to_num(maps.prefix).any()


def test_a_layer_that_nothing_reads_has_no_gradient(inspected: Inspect) -> None:
    model = inspected("sa", "clip", "neox", -2)
    sample = model.prepare(picture(), CAPTION)
    maps = gradient_maps(model, sample)
    assert np.isnan(maps.norms).any(axis=(1, 2)).tolist() == [False] * 7 + [True]
    assert np.isnan(maps.norms[-1]).all()
    assert np.isnan(maps.prefix[-1])
    assert model.layer_gradients(sample)[1][-1] is None
    assert set(attention_maps(model, sample).encoder_layers) == {7}


def assert_distributions(maps: AttentionMaps) -> None:
    total = maps.weights.sum(axis=(-2, -1)) + maps.prefix + maps.text
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (maps.weights >= 0).all()


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov3", "naflex"])
@pytest.mark.parametrize("method", ["hive", "cascaded"])
def test_cross_attention_is_the_models_own(inspected: Inspect, method: str, vision: str) -> None:
    model = inspected(method, vision)
    sample = model.prepare(picture(), CAPTION)
    maps = attention_maps(model, sample)
    assert_distributions(maps)
    assert not maps.text.any()
    own = model.model(**sample.inputs, output_cross_attentions=True).cross_attentions
    prefix, (rows, columns) = PREFIX_TOKENS.get(vision, 0), sample.grid
    for found, before, weights in zip(maps.weights, maps.prefix, own, strict=True):
        patches = weights[0, :, :, prefix : prefix + rows * columns].detach().numpy()
        assert np.array_equal(found.reshape(*found.shape[:2], -1), patches)
        reference = weights[0, :, :, :prefix].sum(-1).detach().numpy()
        np.testing.assert_allclose(before, reference, atol=1e-6)
    assert maps.layers == (2, 4)
    assert maps.encoder_layers == ((4, 8) if method == "hive" else (8, 8))


@pytest.mark.parametrize(("vision", "prefix"), [("clip", 0), ("siglip", 0), ("dinov3", 5)])
def test_self_attention_is_that_of_a_stock_model(
    inspected: Inspect, vision: str, prefix: int, tmp_path: Path
) -> None:
    model = inspected("sa", vision)
    sample = model.prepare(picture(), CAPTION)
    maps = attention_maps(model, sample)
    assert_distributions(maps)
    model.model.save_pretrained(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        own = stock.eval()(**sample.inputs, output_attentions=True).attentions
    queries = [0, *range(17 + prefix, own[0].shape[2])]
    assert len(queries) == len(sample.tokens)
    for layer, weights in enumerate(own):
        rows = weights[0][:, queries].numpy()
        patches = rows[:, :, 1 + prefix : 17 + prefix].reshape(4, -1, 4, 4)
        np.testing.assert_allclose(maps.weights[layer], patches, atol=1e-6)
        np.testing.assert_allclose(
            maps.prefix[layer], rows[:, :, 1 : 1 + prefix].sum(-1), atol=1e-6
        )
    assert not maps.weights[:, :, 0].any(), "what stands before the image cannot see it"
    assert maps.layers == (1, 2, 3, 4)
    assert maps.encoder_layers == (8,) * 4


def all_maps(model: InspectedModel) -> list[np.ndarray]:
    sample = model.prepare(picture(), CAPTION)
    gradients, attention = gradient_maps(model, sample), attention_maps(model, sample)
    return [gradients.norms, gradients.prefix, attention.weights, attention.text]


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_neither_attention_kernel_nor_checkpointing_changes_maps(
    inspected: Inspect, method: str, tmp_path: Path
) -> None:
    model = inspected(method, "dinov3")
    expected = all_maps(model)
    model.model.save_pretrained(tmp_path)
    eager = type(model.model).from_pretrained(tmp_path, attn_implementation="eager")
    recomputing = deepcopy(model.model).train()
    recomputing.gradient_checkpointing_enable({"use_reentrant": False})
    for part in (eager.eval(), recomputing):
        found = all_maps(InspectedModel(part, model.processor))
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_heads(inspected: Inspect) -> None:
    model = inspected("hive")
    maps = attention_maps(model, model.prepare(picture(), CAPTION))
    heads = [maps.combined(number) for number in range(1, 5)]
    np.testing.assert_allclose(maps.combined("mean"), sum(heads) / 4)
    assert np.array_equal(maps.combined("max"), np.maximum.reduce(heads))
    assert np.array_equal(heads[2], maps.weights[:, 2])
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"heads is {number}; the model has heads 1 to 4"):
            maps.combined(number)
