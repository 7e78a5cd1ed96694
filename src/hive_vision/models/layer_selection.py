"""Which encoder layers feed which language-model layers (paper section 3.2 and 4.5).

Layers are counted from 1, as in the paper: layer ``l`` is the output F_l of block ``l``.
"""

from collections.abc import Sequence
from typing import Literal

Selection = Literal["uniform", "later", "last"] | Sequence[int]


def spread_evenly(num_layers: int, count: int) -> list[int]:
    """Split the layers into ``count`` near-equal groups, larger first; take each group's last.

    The authors' layer lists follow this rule (24 layers, 6 groups: 4, 8, ..., 24).

    Args:
        num_layers: Depth of the stack.
        count: How many layers to take, ``1 <= count <= num_layers``.

    Returns:
        ``count`` strictly increasing 1-based layer numbers, the last one ``num_layers``.
    """
    assert 1 <= count <= num_layers, (count, num_layers)
    size, larger = divmod(num_layers, count)
    return [(i + 1) * size + min(i + 1, larger) for i in range(count)]


def select_encoder_layers(num_layers: int, selection: Selection, density: float) -> list[int]:
    """Choose S, the encoder layers whose features reach the language model.

    Args:
        num_layers: Number of encoder blocks L.
        selection: ``uniform`` spreads S evenly over the depth (section 3.2), ``later`` takes the
            last |S| layers (section 4.5, SigLIP), ``last`` feeds every one of the |S| places from
            layer L (the cascaded baseline, section 6), or the layers themselves, 1-based.
        density: |S| / L, 0.25 in the paper; |S| = round(density * L), at least 1. Not used when
            the layers are given.

    Returns:
        The selected layers, 1-based, one entry for each cross-attention, low to high.

    Raises:
        ValueError: If the selection does not fit the encoder.
    """
    if isinstance(selection, str):
        if not 0 < density <= 1:
            raise ValueError(f"layer_density is {density}; it must be in (0, 1], 0.25 in the paper")
        count = max(1, round(density * num_layers))
        if selection == "uniform":
            return spread_evenly(num_layers, count)
        if selection == "later":
            return list(range(num_layers - count + 1, num_layers + 1))
        if selection == "last":
            return [num_layers] * count
        raise ValueError(
            f"layer_selection is {selection!r}; allowed are 'uniform', 'later', 'last' "
            "or a list of layers"
        )
    layers = list(selection)
    if not layers or sorted(set(layers)) != layers:
        raise ValueError(f"layer_selection is {layers}; give distinct layers in increasing order")
    if layers[0] < 1 or layers[-1] > num_layers:
        raise ValueError(
            f"layer_selection is {layers}; the encoder has layers 1 to {num_layers}, counted from 1"
        )
    return layers


def select_decoder_layers(
    num_layers: int, count: int, explicit: Sequence[int] | None = None
) -> list[int]:
    """Choose the language-model layers that attend to the image, spread evenly by default.

    Args:
        num_layers: Number of decoder layers.
        count: Number of cross-attentions |S|.
        explicit: The layers themselves, 1-based, instead of the even spread.

    Returns:
        ``count`` strictly increasing 1-based layers.

    Raises:
        ValueError: If the decoder is too shallow or the explicit layers do not fit.
    """
    if count > num_layers:
        raise ValueError(
            f"{count} encoder layers are selected but the language model has only {num_layers} "
            "layers; lower layer_density or choose a deeper language model"
        )
    if explicit is None:
        return spread_evenly(num_layers, count)
    layers = list(explicit)
    if len(layers) != count or sorted(set(layers)) != layers:
        raise ValueError(
            f"decoder_layers is {layers}; give {count} distinct layers in increasing order, "
            "one for each selected encoder layer"
        )
    if layers[0] < 1 or layers[-1] > num_layers:
        raise ValueError(
            f"decoder_layers is {layers}; the language model has layers 1 to {num_layers}, "
            "counted from 1"
        )
    return layers
