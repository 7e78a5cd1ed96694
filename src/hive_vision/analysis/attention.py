"""Attention in numbers: how spread out it is, and whether a word looks at what it names.

Shapes: S attending layers, A heads, T text tokens, R x C patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hive_vision.analysis.inspection import Sample
from hive_vision.analysis.maps import AttentionMaps


@dataclass(frozen=True)
class Spread:
    """How spread out the attention of one caption is, averaged over its tokens.

    Tokens that see no patch are left out (of ``sa`` the start token, which precedes the image).

    Attributes:
        entropy: (S, A) of the attention on patches, as a share of the highest: 1 is even.
        distance: (S, A) root mean square distance from its centre, in image sides (an even map of
            a square image: 0.41).
        patches: (S, A) share of attention on patches; the rest is on prefix tokens or text.
    """

    entropy: NDArray[np.float64]
    distance: NDArray[np.float64]
    patches: NDArray[np.float64]


@dataclass(frozen=True)
class Pointing:
    """Whether the attention of an object's words falls on the object.

    Attributes:
        mass: (S,) share of the attention on patches that lies on the object; heads averaged.
        others: (S,) the same share of the attention of the words for the image's other objects; NaN
            where there are none. A model that looks at objects whatever is said has both alike.
        hit: (S,) 1 where the most attended patch is one that the object covers by half or more.
        area: Share of the image that the object covers: what ``mass`` is of even attention.
        patches: Share of the patches that it covers by half or more: what ``hit`` is by chance.
    """

    mass: NDArray[np.float64]
    others: NDArray[np.float64]
    hit: NDArray[np.float64]
    area: float
    patches: float


def attention_spread(maps: AttentionMaps) -> Spread:
    """Summarise the attention of one caption's tokens.

    Args:
        maps: Its maps.
    """
    rows, columns = maps.weights.shape[-2:]
    total = maps.weights.sum(axis=(-2, -1))
    shares = maps.weights / np.maximum(total, np.finfo(np.float64).tiny)[..., None, None]
    logs = np.log(np.where(shares > 0, shares, 1.0))
    entropy = -(shares * logs).sum(axis=(-2, -1)) / np.log(rows * columns)
    side = max(rows, columns)
    y, x = np.mgrid[:rows, :columns] / side
    centre_y, centre_x = ((shares * axis).sum(axis=(-2, -1))[..., None, None] for axis in (y, x))
    squares = (y - centre_y) ** 2 + (x - centre_x) ** 2
    distance = np.sqrt((shares * squares).sum(axis=(-2, -1)))
    entropy, distance, total = (
        (values * (total > 0)).sum(axis=-1) / (total > 0).sum(axis=-1)
        for values in (entropy, distance, total)
    )
    return Spread(entropy=entropy, distance=distance, patches=total)


def pointing(
    maps: AttentionMaps,
    sample: Sample,
    span: tuple[int, int],
    mask: NDArray[np.bool_],
    other_spans: Sequence[tuple[int, int]] = (),
) -> Pointing | None:
    """Compare where a phrase looks with where its object is.

    Each token's look is the one before it is written and the one after, averaged.

    Args:
        maps: The attention of the caption.
        sample: The caption's tokens.
        span: Characters ``[start, stop)`` of the phrase.
        mask: (H, W) where the object is; the image as the encoder sees it, at any resolution.
        other_spans: The phrases for the image's other objects.

    Returns:
        ``None`` if the caption was cut before the phrase.
    """
    attention = _look(maps, sample, span)
    if attention is None:
        return None
    covered = coverage(mask, sample.grid)
    most = attention.reshape(len(attention), -1).argmax(axis=-1)
    others = [_look(maps, sample, other) for other in other_spans]
    masses = [_share(other, covered) for other in others if other is not None]
    return Pointing(
        mass=_share(attention, covered),
        others=np.mean(masses, axis=0) if masses else np.full(len(attention), np.nan),
        hit=(covered.reshape(-1)[most] >= 0.5).astype(np.float64),
        area=float(covered.mean()),
        patches=float((covered >= 0.5).mean()),
    )


def _look(maps: AttentionMaps, sample: Sample, span: tuple[int, int]) -> NDArray[np.float64] | None:
    """Attention (S, R, C) of a phrase; ``None`` if the caption was cut before it."""
    start, stop = span
    tokens = [n for n, (a, b) in enumerate(sample.spans) if b > start and a < stop]
    if not tokens:
        return None
    looks = sorted({place for token in tokens for place in (token - 1, token)})
    return np.asarray(maps.combined("mean")[:, looks].mean(axis=1))


def _share(attention: NDArray[np.float64], covered: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.maximum(attention.sum(axis=(-2, -1)), np.finfo(np.float64).tiny)
    return np.asarray((attention * covered).sum(axis=(-2, -1)) / total)


def mean_pointing(looks: Sequence[Pointing]) -> Pointing:
    """Average the objects of one image, so that images count alike."""
    return Pointing(
        mass=np.mean([look.mass for look in looks], axis=0),
        others=np.mean([look.others for look in looks], axis=0),
        hit=np.mean([look.hit for look in looks], axis=0),
        area=float(np.mean([look.area for look in looks])),
        patches=float(np.mean([look.patches for look in looks])),
    )


def coverage(mask: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Share of each patch that a mask (H, W) covers, (R, C).

    Raises:
        ValueError: If the mask cannot be divided into patches.
    """
    (height, width), (rows, columns) = mask.shape, grid
    if height % rows or width % columns:
        raise ValueError(
            f"the mask has {height} x {width} pixels, which do not divide into {rows} x {columns} "
            "patches"
        )
    blocks = mask.reshape(rows, height // rows, columns, width // columns)
    return np.asarray(blocks.mean(axis=(1, 3)))
