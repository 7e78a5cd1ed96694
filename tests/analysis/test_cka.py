"""Linear CKA, against the definition of its unbiased estimate as a mean over four images."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import ortho_group

from hive_vision.analysis.cka import cka_matrix, layer_means, linear_cka
from hive_vision.models.backbones import find_blocks, load_vision_model
from hive_vision.models.processing import load_image_processor
from tests.analysis.helpers import picture
from tests.models.helpers import PREFIX_TOKENS


def features(seed: int, images: int, width: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(images, width)) + seed % 7


def over_four_images(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """HSIC as a U-statistic (Song et al. 2012, equation 4): over all four different images."""

    def hsic(k: NDArray[np.float64], m: NDArray[np.float64]) -> float:
        four = list(permutations(range(len(k)), 4))
        return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in four) / len(four)

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5


@given(seed=st.integers(0, 10**6), images=st.integers(6, 8), width=st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_rotated_scaled_and_moved_is_the_same(seed: int, images: int, width: int) -> None:
    x, y = features(seed, images, width), features(seed + 1, images, width + 3)
    moved = -2.5 * x @ ortho_group.rvs(width, random_state=seed) + 4
    assert linear_cka(x, moved) == pytest.approx(1)
    found = linear_cka(x, y)
    assert found == pytest.approx(over_four_images(x, y), rel=1e-6, abs=1e-9)
    assert found == pytest.approx(linear_cka(y, x))
    assert found == pytest.approx(linear_cka(moved, y))


@pytest.mark.parametrize(("images", "width"), [(32, 128), (64, 96), (64, 1024)])
def test_unrelated_features_share_nothing(images: int, width: int) -> None:
    found = [
        linear_cka(features(7 * s, images, width), features(7 * s + 3, images, width))
        for s in range(20)
    ]
    assert abs(np.mean(found)) < 0.03


def test_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 images; got 3"):
        linear_cka(features(0, 3, 2), features(1, 3, 2))


def test_matrix_and_other_images() -> None:
    one = np.stack([features(seed, 6, 4) for seed in range(3)]).astype(np.float32)
    other = np.stack([features(seed, 6, 5) for seed in range(2)])
    matrix = cka_matrix(one, other)
    assert matrix.shape == (3, 2)
    assert matrix[2, 1] == linear_cka(one[2], other[1])
    with pytest.raises(ValueError, match="features of 6 and 5 images cannot be compared"):
        linear_cka(one[0], other[0][:5])


@pytest.mark.parametrize("vision", [*PREFIX_TOKENS, "naflex"])
def test_means_of_patches(vision: str, backbone_folders: dict[str, Path]) -> None:
    encoder = load_vision_model(backbone_folders[vision])
    processor = load_image_processor(backbone_folders[vision])
    images = [picture(n, height=height) for n, height in enumerate((40, 32, 16))]
    means = layer_means(encoder, processor, images, batch_size=2)
    assert means.shape == (8, 3, 32)
    for place, image in enumerate(images):
        inputs = processor([image], return_tensors="pt")
        patches = slice(PREFIX_TOKENS.get(vision, 0), None)
        if vision == "naflex":
            patches = slice(0, int(inputs["pixel_attention_mask"].sum()))
        kept = []
        handle = find_blocks(encoder)[4].register_forward_hook(
            lambda module, args, output, to=kept: to.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        with torch.no_grad():
            encoder(**inputs)
        handle.remove()
        expected = kept[0][0, patches].mean(dim=0)
        np.testing.assert_allclose(means[4, place], expected, atol=1e-5)
