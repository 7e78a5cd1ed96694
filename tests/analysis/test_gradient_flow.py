"""Gradient flow in numbers, against hand-made maps and brute force."""

from copy import deepcopy
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from hive_vision.analysis.gradient_flow import (
    GradientRecorder,
    gradient_flow,
    map_entropy,
    weight_updates,
)
from hive_vision.analysis.inspection import InspectedModel
from hive_vision.analysis.maps import gradient_maps
from hive_vision.models.backbones import find_blocks
from hive_vision.models.hive import HiveForConditionalGeneration
from tests.analysis.conftest import Inspect
from tests.analysis.helpers import prepared
from tests.models.helpers import captions, images


def test_entropy_of_hand_made_maps() -> None:
    spot = np.zeros((3, 4))
    spot[1, 2] = 5.0
    assert map_entropy(np.full((3, 4), 0.2)) == pytest.approx(np.log(12))
    assert map_entropy(spot) == 0
    assert map_entropy(np.array([[1.0, 3.0]])) == pytest.approx(
        0.25 * np.log(4) + 0.75 * np.log(4 / 3)
    )
    assert np.isnan(map_entropy(np.zeros((2, 2))))
    assert np.isnan(map_entropy(np.full((2, 2), np.nan)))


def test_numbers_are_those_of_the_maps(inspected: Inspect) -> None:
    model = inspected("hive", "dinov3")
    samples = prepared(model, 3)
    flow = gradient_flow(model, iter(samples))
    for sample, norms, entropy, patches in zip(
        samples, flow.norms, flow.entropy, flow.patches, strict=True
    ):
        found = gradient_maps(model, sample)
        maps = found.norms
        on_patches = np.linalg.norm(maps.reshape(8, -1), axis=1)
        np.testing.assert_allclose(norms, np.hypot(on_patches, found.prefix), rtol=1e-6)
        shares = maps.reshape(8, -1) / maps.reshape(8, -1).sum(axis=1, keepdims=True)
        nats = -(shares * np.log(shares)).sum(axis=1)
        np.testing.assert_allclose(entropy, nats / np.log(16))
        np.testing.assert_allclose(patches, np.exp(nats))
    np.testing.assert_allclose(10**flow.relative, flow.norms / flow.norms[:, -1:])


def test_relative_to_the_last_layer_that_is_reached(inspected: Inspect) -> None:
    model = inspected("sa", "clip", "neox", -2)
    flow = gradient_flow(model, prepared(model, 2))
    assert np.isnan(flow.norms[:, -1]).all()
    assert np.isnan(flow.relative[:, -1]).all()
    assert not flow.relative[:, -2].any()
    np.testing.assert_allclose(
        flow.relative[:, 0], np.log10(flow.norms[:, 0]) - np.log10(flow.norms[:, 6])
    )


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_agreement_is_the_mean_cosine_of_all_pairs(inspected: Inspect, method: str) -> None:
    model = inspected(method, "clip", "neox", -2)
    samples = prepared(model, 9)
    flow = gradient_flow(model, samples)
    assert flow.agreement.shape == (1, 8), "the ninth sample is in no group"
    copy = InspectedModel(deepcopy(model.model), model.processor)
    gradients = []
    for sample in samples[:8]:
        copy.model.zero_grad(set_to_none=True)
        copy.loss(sample).backward()
        gradients.append(
            [
                torch.cat([weight.grad.flatten() for weight in block.parameters()])
                for block in copy.blocks
                if next(block.parameters()).grad is not None
            ]
        )
    for layer, found in enumerate(flow.agreement[0]):
        if method == "sa" and layer == 7:  # feature layer -2
            assert np.isnan(found)
            continue
        cosines = [
            torch.cosine_similarity(one[layer].double(), other[layer].double(), dim=0)
            for one, other in combinations(gradients, 2)
        ]
        assert found == pytest.approx(float(np.mean(cosines)), abs=1e-5)


def test_every_group_is_compared_by_itself(inspected: Inspect) -> None:
    model = inspected("hive", "siglip")
    samples = prepared(model, 16)
    both = gradient_flow(model, samples).agreement
    alone = [gradient_flow(model, group).agreement[0] for group in (samples[:8], samples[8:])]
    np.testing.assert_allclose(both, alone, atol=1e-6)


def test_gradients_of_zero_agree_with_nothing(inspected: Inspect) -> None:
    """As of a model whose cross-attention has not left its start."""
    model = inspected("hive", "siglip")
    start = InspectedModel(deepcopy(model.model), model.processor)
    for block in start.model.cross_attentions:
        block.o_proj.requires_grad_(False).weight.zero_()
    flow = gradient_flow(start, prepared(start, 8))
    assert not flow.norms.any()
    for values in (flow.agreement, flow.entropy, flow.patches):
        assert np.isnan(values).all()


def test_no_samples(inspected: Inspect) -> None:
    with pytest.raises(ValueError, match="at least one sample; got none"):
        gradient_flow(inspected("hive"), [])


def test_weight_updates_by_hand(inspected: Inspect) -> None:
    before = inspected("hive").vision
    after = deepcopy(before).requires_grad_(False)
    blocks = find_blocks(after)
    for weight in blocks[2].parameters():
        weight *= 1.1
    next(blocks[4].parameters()).zero_()
    found = weight_updates(before, after)
    old = find_blocks(before)[4]
    share = (
        next(old.parameters()).norm() / torch.cat([w.flatten() for w in old.parameters()]).norm()
    )
    expected = np.zeros(8)
    expected[[2, 4]] = 0.1, float(share)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- listening to training --------------------------------------------------------------------


def step(model: HiveForConditionalGeneration, seed: int) -> None:
    ids = captions(2, 6, seed)
    model(input_ids=ids, pixel_values=images(2, seed), labels=ids).loss.backward()


def expected_norms(model: HiveForConditionalGeneration, seeds: list[int]) -> list[float]:
    """With retained gradients, of a copy."""
    squares = torch.zeros(8)
    for seed in seeds:
        outputs: list[Tensor] = []

        def keep(module: object, args: object, output: Tensor, to: list[Tensor] = outputs) -> None:
            output.retain_grad()
            to.append(output)

        copy = deepcopy(model)
        for block in find_blocks(copy.vision_model):
            block.register_forward_hook(keep)
        step(copy, seed)
        squares += torch.stack([output.grad.square().sum() for output in outputs])
    return squares.sqrt().tolist()


@pytest.mark.parametrize("vision", ["clip", "timm"])
@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_recorder_hears_the_training_pass(
    inspected: Inspect, vision: str, checkpointing: bool | str
) -> None:
    model = deepcopy(inspected("hive", vision).model).train()
    both, second = expected_norms(model, [0, 1]), expected_norms(model, [1])
    if checkpointing:
        options = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(options)
    silent = deepcopy(model)
    recorder = GradientRecorder(model.vision_model)
    recorder.start()
    for seed in (0, 1):  # accumulation
        step(model, seed)
        step(silent, seed)
    assert recorder.stop() == pytest.approx(both, rel=1e-5)
    for heard, unheard in zip(model.parameters(), silent.parameters(), strict=True):
        assert heard.grad is unheard.grad is None or torch.equal(heard.grad, unheard.grad)
    assert not any(block._forward_hooks for block in recorder.blocks)
    step(model, 0)
    assert recorder.stop() == []
    recorder.start()
    step(model, 0)
    recorder.start()  # begins anew
    step(model, 1)
    assert recorder.stop() == pytest.approx(second, rel=1e-5)


def test_recorder_says_where_nothing_arrives(inspected: Inspect) -> None:
    model = inspected("sa", "clip", "neox", -2)
    copy = InspectedModel(deepcopy(model.model).train(), model.processor)
    recorder = GradientRecorder(copy.vision)
    recorder.start()
    copy.loss(prepared(copy, 1)[0]).backward()
    norms = recorder.stop()
    assert np.isnan(norms).tolist() == [False] * 7 + [True]
