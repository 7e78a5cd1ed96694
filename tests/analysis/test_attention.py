"""Attention in numbers, by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hive_vision.analysis.attention import (
    Pointing,
    attention_spread,
    coverage,
    mean_pointing,
    pointing,
)
from hive_vision.analysis.inspection import Sample
from hive_vision.analysis.maps import AttentionMaps


def maps_of(weights: NDArray[np.float64]) -> AttentionMaps:
    """(S, A, T, R, C); what is missing to 1 is on the prefix."""
    rest = 1 - weights.sum(axis=(-2, -1))
    layers = tuple(range(1, len(weights) + 1))
    return AttentionMaps(weights, rest, np.zeros_like(rest), layers, layers)


def sample_of(spans: tuple[tuple[int, int], ...], grid: tuple[int, int] = (2, 2)) -> Sample:
    names = tuple(map(str, range(len(spans))))
    return Sample({}, Image.new("RGB", (4, 4)), grid, names, tuple(range(len(spans))), spans)


def at(row: int, column: int, weight: float, size: int = 2) -> NDArray[np.float64]:
    found = np.zeros((size, size))
    found[row, column] = weight
    return found


def test_spread_of_hand_made_maps() -> None:
    even, spot = np.full((4, 4), 1 / 32), at(2, 1, 0.3, 4)
    pair = at(0, 0, 0.2, 4) + at(0, 2, 0.2, 4)
    spread = attention_spread(maps_of(np.array([[[even, even], [spot, spot], [pair, pair]]])))
    np.testing.assert_allclose(spread.entropy, [[1, 0, 0.25]], atol=1e-12)
    # Root mean square of steps (0.5, 1.5) of a quarter along two axes; one step of a quarter.
    np.testing.assert_allclose(spread.distance, [[(2 * 1.25) ** 0.5 / 4, 0, 0.25]], atol=1e-12)
    np.testing.assert_allclose(spread.patches, [[0.5, 0.3, 0.4]])


def test_spread_is_the_mean_of_tokens_that_see_patches() -> None:
    even, spot, nothing = np.full((2, 2), 0.25), at(0, 1, 0.5), np.zeros((2, 2))
    spread = attention_spread(maps_of(np.array([[[nothing, even, spot, even]]])))
    np.testing.assert_allclose(spread.entropy, [[2 / 3]])
    np.testing.assert_allclose(spread.patches, [[2.5 / 3]])


def test_distance_is_in_sides_of_the_longer_one() -> None:
    weights = np.zeros((1, 1, 1, 2, 4))
    weights[..., 1, 0] = weights[..., 1, 3] = 0.5
    assert attention_spread(maps_of(weights)).distance == pytest.approx(1.5 / 4)


MASK = np.zeros((4, 4), bool)
MASK[:2, :3] = True  # all of the patch 0, 0 and half of 0, 1


def test_coverage_of_patches() -> None:
    np.testing.assert_array_equal(coverage(MASK, (2, 2)), [[1, 0.5], [0, 0]])
    np.testing.assert_array_equal(coverage(MASK, (4, 4)), MASK)
    np.testing.assert_array_equal(coverage(MASK[:2], (1, 2)), [[1, 0.5]])
    with pytest.raises(ValueError, match=r"mask has 4 x 4 pixels, .* into 3 x 2 patches"):
        coverage(MASK, (3, 2))


def test_pointing_by_hand() -> None:
    """The phrase's tokens are 2 and 3: rows 1 to 3 count, of both heads."""
    away = at(1, 1, 0.9)
    first = [away, at(0, 0, 0.6), at(0, 1, 0.4), at(1, 0, 0.5), away]
    second = [away, at(0, 0, 0.6), at(0, 1, 0.4), at(1, 0, 0.5), away]
    layers = np.array([[first, second], [[away] * 5, [away] * 5]])
    spans = ((0, 0), (0, 1), (1, 7), (7, 14), (0, 0))  # "a small circle"
    found = pointing(maps_of(layers), sample_of(spans), (2, 14), MASK)
    assert found is not None
    np.testing.assert_allclose(found.mass, [(0.6 + 0.4 / 2) / 1.5, 0])
    np.testing.assert_array_equal(found.hit, [1, 0])
    assert (found.area, found.patches) == (6 / 16, 0.5)
    assert np.isnan(found.others).all(), "there is no other object"
    # The words of another object, token 1: rows 0 and 1 count.
    also = pointing(maps_of(layers), sample_of(spans), (2, 14), MASK, [(0, 1), (20, 30)])
    assert also is not None
    np.testing.assert_allclose(also.others, [0.6 / 1.5, 0])
    np.testing.assert_array_equal(also.mass, found.mass)


def test_a_patch_is_hit_from_half_on() -> None:
    layers = np.array([[[at(0, 1, 0.5)] * 3]])  # where half is covered
    found = pointing(maps_of(layers), sample_of(((0, 0), (0, 3), (0, 0))), (0, 3), MASK)
    assert found is not None
    np.testing.assert_array_equal(found.hit, [1])
    np.testing.assert_allclose(found.mass, [0.5])


def test_heads_are_averaged() -> None:
    layers = np.array([[[at(0, 0, 0.2)] * 3, [at(1, 1, 0.6)] * 3]])
    found = pointing(maps_of(layers), sample_of(((0, 0), (0, 3), (0, 0))), (0, 3), MASK)
    assert found is not None
    np.testing.assert_allclose(found.mass, [0.25])
    np.testing.assert_array_equal(found.hit, [0])


def test_words_that_were_cut_off() -> None:
    sample = sample_of(((0, 0), (0, 1), (1, 7), (0, 0)))
    maps = maps_of(np.full((1, 1, 4, 2, 2), 0.25))
    assert pointing(maps, sample, (8, 14), MASK) is None
    assert pointing(maps, sample, (7, 14), MASK) is None, "the end of a token is not in it"
    assert pointing(maps, sample, (6, 14), MASK) is not None


def test_mean_of_objects() -> None:
    one = Pointing(np.array([0.2, 0.4]), np.array([0.1, 0.1]), np.array([1.0, 0.0]), 0.1, 0.2)
    other = Pointing(np.array([0.6, 0.4]), np.array([0.3, 0.2]), np.array([1.0, 1.0]), 0.3, 0.2)
    found = mean_pointing([one, other])
    np.testing.assert_allclose(found.others, [0.2, 0.15])
    np.testing.assert_allclose(found.mass, [0.4, 0.4])
    np.testing.assert_allclose(found.hit, [1, 0.5])
    assert (found.area, found.patches) == (pytest.approx(0.2), pytest.approx(0.2))
