"""How alike the layers of two encoders are: linear CKA (Kornblith et al. 2019), debiased.

Shapes: n images, L layers, D encoder width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedModel

from hive_vision.models.backbones import capture_block_outputs, find_blocks, image_token_counts

FEWEST = 4  # images that the estimate is defined for


@torch.no_grad()
def layer_means(
    encoder: PreTrainedModel,
    image_processor: Any,
    images: Sequence[Image.Image],
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Average the patch tokens of every layer, (L, n, D).

    Args:
        encoder: A vision encoder.
        image_processor: Its own.
        images: RGB.
        batch_size: Images at once.
    """
    config = encoder.config
    layers = range(1, config.num_hidden_layers + 1)
    _, prefix = image_token_counts(config)
    encoder.eval()
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(images), batch_size):
        inputs = image_processor(list(images[start : start + batch_size]), return_tensors="pt")
        blocks = find_blocks(encoder, config.num_hidden_layers)
        with capture_block_outputs(blocks, layers) as features:
            encoder(**inputs.to(encoder.device))
        tokens = torch.stack([features[layer][:, prefix:] for layer in layers])
        if "pixel_attention_mask" in inputs:  # what lies behind the patches there is padding
            shares = inputs["pixel_attention_mask"].to(tokens)
            shares = shares / shares.sum(dim=1, keepdim=True)
            means = (tokens * shares[..., None]).sum(dim=2)
        else:
            means = tokens.mean(dim=2)
        found.append(means.float().cpu().numpy())
    return np.concatenate(found, axis=1)


def linear_cka(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Compare two representations of the same images, without the bias of few images.

    The plain estimate calls unrelated features alike where images are few (independent ones of 96
    numbers on 64 images: 0.59), so HSIC is estimated as Song et al. (2012, equation 5) do.

    Args:
        first: (n, D).
        second: (n, D').

    Returns:
        1 where one is a rotated and scaled copy of the other; about 0, on either side of it, where
        they share nothing.

    Raises:
        ValueError: If they are not of the same images, or of fewer than 4.
    """
    if len(first) != len(second):
        raise ValueError(f"features of {len(first)} and {len(second)} images cannot be compared")
    if len(first) < FEWEST:
        raise ValueError(f"CKA needs at least {FEWEST} images; got {len(first)}")
    x, y = (_gram(part) for part in (first, second))
    return _hsic(x, y) / float(np.sqrt(_hsic(x, x) * _hsic(y, y)))


def _gram(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Products of all pairs of images (n, n), without those of an image with itself."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    products = centred @ centred.T
    np.fill_diagonal(products, 0.0)
    return np.asarray(products)


def _hsic(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two Gram matrices."""
    n = len(x)
    total = (x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (x.sum(axis=0) @ y.sum(axis=0))) / (n * (n - 3)))


def cka_matrix(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compare every layer of one encoder with every layer of another.

    Args:
        first: (L, n, D).
        second: (L', n, D').

    Returns:
        (L, L').
    """
    return np.array([[linear_cka(x, y) for y in second] for x in first])
