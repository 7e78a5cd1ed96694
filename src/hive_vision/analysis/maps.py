"""Where the loss's gradient arrives in an encoder, and where words look (Figures 2-14).

Shapes: L encoder layers, S attending language-model layers, A heads, T text tokens, R x C patches.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hive_vision.analysis.inspection import InspectedModel, Sample, undisturbed

Heads = Literal["mean", "max"] | int


@dataclass(frozen=True)
class GradientMaps:
    """The gradient of the loss at every layer's output, by patch (Figures 2, 5-11).

    Attributes:
        loss: Mean loss per caption token.
        norms: (L, R, C) L2 norms over channels; NaN where the loss does not depend on a layer.
        prefix: (L,) L2 norm over CLS and registers, which are not on the grid; 0 without them.
    """

    loss: float
    norms: NDArray[np.float64]
    prefix: NDArray[np.float64]


@dataclass(frozen=True)
class AttentionMaps:
    """Where each token of a caption looks (Figures 3, 12-14).

    Rows are distributions: patches, prefix and text sum to 1. Token t is the query, so its row is
    about what comes after it; row t - 1 is where the model looked before it wrote token t. (The
    start token of ``sa`` stands before the image and sees nothing of it.)

    Attributes:
        weights: (S, A, T, R, C) on patches.
        prefix: (S, A, T) on CLS and registers.
        text: (S, A, T) on text; 0 for cross-attention.
        layers: S language-model layers, 1-based.
        encoder_layers: S encoder layers that they look at; the same for all in ``sa``.
    """

    weights: NDArray[np.float64]
    prefix: NDArray[np.float64]
    text: NDArray[np.float64]
    layers: tuple[int, ...]
    encoder_layers: tuple[int, ...]

    def combined(self, heads: Heads = "mean") -> NDArray[np.float64]:
        """Give (S, T, R, C): the mean or the largest of all heads, or one head, 1-based.

        Raises:
            ValueError: If there is no such head.
        """
        if heads == "mean":
            return np.asarray(self.weights.mean(axis=1))
        if heads == "max":
            return np.asarray(self.weights.max(axis=1))
        count = self.weights.shape[1]
        if not 1 <= heads <= count:
            raise ValueError(f"heads is {heads}; the model has heads 1 to {count}, or mean or max")
        return np.asarray(self.weights[:, heads - 1])


def gradient_maps(model: InspectedModel, sample: Sample) -> GradientMaps:
    """Differentiate the loss with respect to every encoder layer's output.

    Args:
        model: The model.
        sample: Image and caption.
    """
    loss, gradients, _ = model.layer_gradients(sample)
    return norms_of(model, sample, loss, gradients)


def norms_of(
    model: InspectedModel, sample: Sample, loss: float, gradients: list[Tensor | None]
) -> GradientMaps:
    """Lay out gradients' norms.

    Args:
        model: The model.
        sample: Image and caption.
        loss: Its loss.
        gradients: L of (N, D), see ``InspectedModel.layer_gradients``.
    """
    norms, prefix = np.full((len(gradients), *sample.grid), np.nan), np.full(len(gradients), np.nan)
    for layer, gradient in enumerate(gradients):
        if gradient is None:
            continue
        by_token = gradient.double().norm(dim=-1)
        norms[layer] = model.patches(by_token, sample.grid)
        before = model.prefix(len(by_token), sample.grid)
        prefix[layer] = float(by_token[:before].norm())
    return GradientMaps(loss, norms, prefix)


@torch.no_grad()
def attention_maps(model: InspectedModel, sample: Sample) -> AttentionMaps:
    """Collect the attention of caption tokens on an image.

    Of ``hive`` and ``cascaded`` the cross-attentions; of ``sa`` the language model's
    self-attention, of which the columns of image tokens are taken.

    Args:
        model: The model.
        sample: Image and caption.
    """
    with undisturbed(model.model):
        return _self_attention(model, sample) if model.is_llava else _cross(model, sample)


def _cross(model: InspectedModel, sample: Sample) -> AttentionMaps:
    output = model.model(**sample.inputs, output_cross_attentions=True, return_logits=False)
    weights = torch.stack([layer[0] for layer in output.cross_attentions])  # (S, A, T, N)
    config = model.model.config
    before = model.prefix(weights.shape[-1], sample.grid)
    return AttentionMaps(
        weights=model.patches(weights, sample.grid),
        prefix=weights[..., :before].double().sum(-1).cpu().numpy(),
        text=np.zeros(weights.shape[:-1]),
        layers=tuple(config.host_layers),
        encoder_layers=tuple(config.encoder_layers),
    )


def _self_attention(model: InspectedModel, sample: Sample) -> AttentionMaps:
    before = model.language.config._attn_implementation
    model.language.set_attn_implementation("eager")  # the one that gives weights
    try:
        output = model.model(**sample.inputs, output_attentions=True, return_logits=False)
    finally:
        model.language.set_attn_implementation(before)
    rows = torch.stack([layer[0] for layer in output.attentions])[:, :, list(sample.places)]
    is_image = sample.inputs["input_ids"][0] == model.model.config.image_token_index
    weights = rows[..., is_image]
    prefix = model.prefix(weights.shape[-1], sample.grid)
    config = model.model.config
    states = range(model.depth + 1)  # what enters the first block, and what leaves each
    read = states[config.vision_feature_layer]
    return AttentionMaps(
        weights=model.patches(weights, sample.grid),
        prefix=weights[..., :prefix].double().sum(-1).cpu().numpy(),
        text=rows[..., ~is_image].double().sum(-1).cpu().numpy(),
        layers=tuple(range(1, len(rows) + 1)),
        encoder_layers=(read,) * len(rows),
    )
