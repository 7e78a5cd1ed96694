"""How much gradient reaches which encoder layer, in numbers (paper section 3.2).

Shapes: n samples, L encoder layers, R x C patches.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hive_vision.analysis.inspection import InspectedModel, Sample
from hive_vision.analysis.maps import norms_of
from hive_vision.models.backbones import find_blocks

GROUP = 8  # samples whose gradients are compared with each other


@dataclass(frozen=True)
class GradientFlow:
    """What a data set's gradients look like at every layer.

    Attributes:
        norms: (n, L) norm of the gradient at a layer's output; NaN where there is none.
        entropy: (n, L) of the gradient map, as a share of the highest: 1 is even, 0 one patch.
        patches: (n, L) effective number of patches, exp of the entropy in nats.
        agreement: (n / 8, L) mean cosine between the parameter gradients of two samples.
    """

    norms: NDArray[np.float64]
    entropy: NDArray[np.float64]
    patches: NDArray[np.float64]
    agreement: NDArray[np.float64]

    @property
    def relative(self) -> NDArray[np.float64]:
        """(n, L) log10 of the norm relative to that of the last layer that has one."""
        reached = np.flatnonzero(~np.isnan(self.norms).all(axis=0))
        return np.asarray(np.log10(self.norms / self.norms[:, reached[-1:]]))


def gradient_flow(model: InspectedModel, samples: Iterable[Sample]) -> GradientFlow:
    """Measure the gradients of one sample after another.

    Args:
        model: The model.
        samples: Images and captions; what is left over from groups of 8 has no agreement.

    Raises:
        ValueError: If there are no samples.
    """
    norms, entropy, patches, agreement = [], [], [], []
    group: list[Tensor | None] = [None] * model.depth
    for number, sample in enumerate(samples, start=1):
        loss, gradients, vectors = model.layer_gradients(sample, parameters=True)
        maps = norms_of(model, sample, loss, gradients)
        norms.append([np.nan if g is None else float(g.double().norm()) for g in gradients])
        found = [map_entropy(norm) for norm in maps.norms]
        entropy.append([h / np.log(maps.norms[0].size) for h in found])
        patches.append([np.exp(h) for h in found])
        group = [_add_unit(total, vector) for total, vector in zip(group, vectors, strict=True)]
        if number % GROUP == 0:
            agreement.append([_mean_cosine(total) for total in group])
            group = [None] * model.depth
    if not norms:
        raise ValueError("gradient flow needs at least one sample; got none")
    return GradientFlow(
        norms=np.array(norms),
        entropy=np.array(entropy),
        patches=np.array(patches),
        agreement=np.array(agreement).reshape(-1, model.depth),
    )


def map_entropy(weights: NDArray[np.floating]) -> float:
    """Entropy in nats of a map (R, C), taken as a distribution; NaN for a map of zeros or NaN."""
    total = weights.sum()
    if not total > 0:
        return float("nan")
    shares = weights[weights > 0] / total
    return float(-(shares * np.log(shares)).sum())


def weight_updates(before: nn.Module, after: nn.Module) -> NDArray[np.float64]:
    """Relative change of each block of an encoder, (L,).

    Args:
        before: The encoder before training.
        after: The same encoder after it.

    Returns:
        Norm of the change of all of a block's parameters over their norm before.
    """
    changes = []
    for old, new in zip(find_blocks(before), find_blocks(after), strict=True):
        start: Mapping[str, Tensor] = old.state_dict()
        change = sum(
            float((weight.double() - start[name].double()).square().sum())
            for name, weight in new.state_dict().items()
        )
        size = sum(float(weight.double().square().sum()) for weight in start.values())
        changes.append((change / size) ** 0.5)
    return np.array(changes)


def _add_unit(total: Tensor | None, vector: Tensor | None) -> Tensor | None:
    """Add a vector of length 1 to the sum of those before."""
    if vector is None:
        return total
    unit: Tensor = vector / vector.norm()  # NaN of a gradient of zero, which has no direction
    return unit if total is None else total + unit


def _mean_cosine(total: Tensor | None) -> float:
    """Mean cosine of pairs of unit vectors; the square of their sum counts every pair twice."""
    if total is None:
        return float("nan")
    return (float(total.double().square().sum()) - GROUP) / (GROUP * (GROUP - 1))


class GradientRecorder:
    """Notes how large the gradients at an encoder's layers are while it trains, at no cost.

    Hooks on the blocks' outputs see the gradients of the very backward pass that trains; nothing
    is computed twice. Norms are over all images of this process's share of a step.

    Args:
        vision: The encoder.
    """

    def __init__(self, vision: nn.Module) -> None:
        self.blocks = find_blocks(vision)
        self._squares: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Listen to the next step."""
        self.stop()
        for layer, block in enumerate(self.blocks):
            self._handles.append(block.register_forward_hook(self._listen(layer)))

    def stop(self) -> list[float]:
        """Stop listening.

        Returns:
            L norms; empty if no gradient came, as of a frozen encoder.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        squares, self._squares = self._squares, {}
        if not squares:
            return []
        none = torch.tensor(float("nan"))
        return [float(squares.get(layer, none)) ** 0.5 for layer in range(len(self.blocks))]

    def _listen(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hear(gradient: Tensor) -> None:
            square = gradient.detach().float().square().sum()
            self._squares[layer] = self._squares.get(layer, torch.zeros_like(square)) + square

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(hear)

        return hook
