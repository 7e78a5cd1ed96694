"""The projector against its equation, and what its options mean."""

import itertools

import pytest
import torch
from torch import Tensor

from hive_vision.models.projector import Projector
from tests.models.helpers import add_noise, generator

D, H, E = 6, 10, 8


def make_projector(out_size: int = E, *, norm: bool = True, residual: bool = True) -> Projector:
    projector = Projector(D, H, out_size, norm=norm, residual=residual)
    add_noise(projector, 0.5)
    return projector


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, D, generator=generator(seed))


@pytest.mark.parametrize(
    ("out_size", "norm", "residual"), itertools.product((D, E), (False, True), (False, True))
)
def test_equation(out_size: int, norm: bool, residual: bool) -> None:
    projector = make_projector(out_size, norm=norm, residual=residual)
    weights = dict(projector.named_parameters())
    x = features()
    if norm:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-5).sqrt() * weights["norm.weight"] + weights["norm.bias"]
    hidden = x @ weights["up.weight"].T + weights["up.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ weights["down.weight"].T + weights["down.bias"]
    if residual:
        expected = expected + (x if out_size == D else x @ weights["skip.weight"].T)
    torch.testing.assert_close(projector(features()), expected)


@pytest.mark.parametrize(
    ("out_size", "norm", "residual", "expected"),
    [
        (E, True, True, {"norm.weight", "norm.bias", "skip.weight"}),
        (D, True, True, {"norm.weight", "norm.bias"}),
        (E, False, True, {"skip.weight"}),
        (E, True, False, {"norm.weight", "norm.bias"}),
        (D, False, False, set()),
    ],
)
def test_options_bring_exactly_their_weights(
    out_size: int, norm: bool, residual: bool, expected: set[str]
) -> None:
    names = set(make_projector(out_size, norm=norm, residual=residual).state_dict())
    assert names - {"up.weight", "up.bias", "down.weight", "down.bias"} == expected


@pytest.mark.parametrize("residual", [False, True])
def test_norm_makes_huge_activations_harmless(residual: bool) -> None:
    projector = make_projector(residual=residual)
    torch.testing.assert_close(
        projector(features() * 1000), projector(features()), atol=1e-3, rtol=1e-3
    )


def test_tokens_are_projected_one_by_one() -> None:
    projector, x = make_projector(), features()
    alone = torch.stack([projector(x[:, n : n + 1])[:, 0] for n in range(x.shape[1])], dim=1)
    torch.testing.assert_close(projector(x), alone)
