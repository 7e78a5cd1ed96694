"""Draw the miniature's scenes: patterned shapes and real handwritten digits.

Everything here is a function of a `numpy.random.Generator`, so a scene is reproducible from its
own seed alone, whatever was drawn before it. Lengths below are in pixels of a 48-pixel scene and
are scaled to the scene's real size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

KINDS = ("shape", "digit")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
TEXTURES = ("plain", "striped", "checkered", "dotted", "hatched", "outlined")
DIGITS = tuple(str(number) for number in range(10))
SIZES = ("small", "large")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.04),
    "yellow": (0.96, 0.88, 0.10),
    "green": (0.12, 0.66, 0.18),
    "cyan": (0.10, 0.80, 0.84),
    "blue": (0.12, 0.22, 0.88),
    "purple": (0.52, 0.12, 0.72),
    "pink": (0.98, 0.48, 0.72),
}

_DESIGN_SIZE = 48
_SUPERSAMPLE = 2
_RADII = {"small": (9.5, 10.5), "large": (13.0, 15.0)}
# A pixel belongs to an object's mask where the object covers at least this share of it. Digit
# strokes are soft after upscaling, so theirs is lower: the mask must hold the visible stroke.
_SHAPE_COVERAGE = 0.5
_DIGIT_COVERAGE = 0.35
_PLACEMENT_TRIES = 12
# Patterns repeat every 8 pixels and start near the scene's own grid, give or take the jitter. With
# a free phase, telling them apart took a small encoder thousands of steps even under full
# supervision; like this a few hundred do, and an encoder that was never told of texture is still
# far from it.
_PERIOD = 8.0
_PHASE_JITTER = 1.5


@dataclass(frozen=True)
class DigitScans:
    """Handwritten digits to ink into scenes.

    Attributes:
        images: ink in [0, 1], shape (scans, 8, 8).
        labels: digit of each scan, shape (scans,).
        ids: row of each scan in `sklearn.datasets.load_digits`, shape (scans,).
    """

    images: Floats
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]

    def pick(self, rng: np.random.Generator, digit: str) -> int:
        """Return the index (into this set) of a random scan of `digit`."""
        candidates = np.flatnonzero(self.labels == int(digit))
        return int(candidates[rng.integers(len(candidates))])


@dataclass(frozen=True)
class Look:
    """What an object should look like, before it has a place.

    Attributes:
        kind: one of `KINDS`.
        name: one of `SHAPES` or `DIGITS`.
        colour: one of `COLOURS`.
        texture: one of `TEXTURES` for a shape, None for a digit.
        size: one of `SIZES`.
        scan: index into the `DigitScans` for a digit, None for a shape.
    """

    kind: str
    name: str
    colour: str
    texture: str | None
    size: str
    scan: int | None


@dataclass(frozen=True)
class Thing:
    """An object as drawn: its look, and where it ended up.

    Attributes:
        kind: one of `KINDS`.
        name: one of `SHAPES` or `DIGITS`.
        colour: one of `COLOURS`.
        texture: one of `TEXTURES` for a shape, None for a digit.
        size: one of `SIZES`.
        position: "middle", "left", "top", "top left", ... by thirds of the scene.
        box: tight box (x0, y0, x1, y1) of the mask in pixels, x1 and y1 exclusive.
        scan: row in `sklearn.datasets.load_digits` for a digit, None for a shape.
    """

    kind: str
    name: str
    colour: str
    texture: str | None
    size: str
    position: str
    box: tuple[int, int, int, int]
    scan: int | None


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it.

    Attributes:
        image: RGB, uint8, shape (size, size, 3).
        mask: uint8, shape (size, size): 0 is background, k is `things[k - 1]`.
        things: the objects, in drawing order; they do not overlap.
        background: "dark" or "light".
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    things: tuple[Thing, ...]
    background: str


def split_digit_scans(seed: int, held_out: float = 0.3) -> tuple[DigitScans, DigitScans]:
    """Split the handwritten digits into scans to train on and scans never trained on.

    Args:
        seed: the split is a function of it.
        held_out: share of each digit's scans that is held out.

    Returns:
        (training scans, held-out scans), disjoint, each holding all ten digits.
    """
    from sklearn.datasets import load_digits  # a second that only drawing should cost

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng([seed, 0])
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        scans = rng.permutation(np.flatnonzero(labels == digit))
        test[scans[: round(held_out * len(scans))]] = True
    ids = np.arange(len(labels))
    return (
        DigitScans(images[~test], labels[~test], ids[~test]),
        DigitScans(images[test], labels[test], ids[test]),
    )


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of `options`, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def random_look(
    rng: np.random.Generator,
    scans: DigitScans,
    kind: str | None = None,
    name: str | None = None,
    colour: str | None = None,
    texture: str | None = None,
) -> Look:
    """Return a random look; what is given is kept, the rest is drawn uniformly."""
    kind = kind or pick(rng, KINDS)
    name = name or pick(rng, SHAPES if kind == "shape" else DIGITS)
    return Look(
        kind=kind,
        name=name,
        colour=colour or pick(rng, tuple(COLOURS)),
        texture=(texture or pick(rng, TEXTURES)) if kind == "shape" else None,
        size=pick(rng, SIZES),
        scan=scans.pick(rng, name) if kind == "digit" else None,
    )


def draw_scene(
    rng: np.random.Generator, looks: Sequence[Look], scans: DigitScans, image_size: int = 48
) -> Scene:
    """Draw objects at random, non-overlapping places on a random background.

    Where objects do not fit side by side at the sizes asked for, all become small: the size of a
    `Thing` is the one drawn.

    Args:
        rng: source of every random choice.
        looks: one to three objects.
        scans: the digits that `Look.scan` points into.
        image_size: side of the scene in pixels.

    Returns:
        The scene.
    """
    looks, circles = _place(rng, looks, image_size)
    canvas, background = _background(rng, image_size)
    mask = np.zeros((image_size, image_size), dtype=np.uint8)
    things = []
    for number, (look, (x, y, radius)) in enumerate(zip(looks, circles, strict=True), start=1):
        corner, cover, ink = _render(rng, look, scans, (x, y), radius, image_size)
        rows, columns = cover.shape
        window = (slice(corner[1], corner[1] + rows), slice(corner[0], corner[0] + columns))
        canvas[window] += cover[..., None] * (ink - canvas[window])
        inside = cover >= (_DIGIT_COVERAGE if look.kind == "digit" else _SHAPE_COVERAGE)
        mask[window][inside] = number
        things.append(
            Thing(
                kind=look.kind,
                name=look.name,
                colour=look.colour,
                texture=look.texture,
                size=look.size,
                position=_position(x / image_size, y / image_size),
                box=_box(inside, corner),
                scan=None if look.scan is None else int(scans.ids[look.scan]),
            )
        )
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    canvas += rng.uniform(0.01, 0.04) * noise
    image = (np.clip(canvas, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return Scene(image, mask, tuple(things), background)


def _place(
    rng: np.random.Generator, looks: Sequence[Look], image_size: int
) -> tuple[list[Look], list[tuple[float, float, float]]]:
    """Return the looks (smaller if need be) and disjoint (x, y, radius) squares for them."""
    chosen = list(looks)
    while True:
        for _ in range(_PLACEMENT_TRIES):
            circles = _try_place(rng, chosen, image_size)
            if circles is not None:
                return chosen, circles
        chosen = [replace(look, size="small") for look in chosen]


def _try_place(
    rng: np.random.Generator, looks: Sequence[Look], image_size: int
) -> list[tuple[float, float, float]] | None:
    scale = image_size / _DESIGN_SIZE
    circles: list[tuple[float, float, float]] = []
    for look in looks:
        radius = scale * rng.uniform(*_RADII[look.size])
        # Every free centre on a one-pixel grid, so that placing cannot fail by bad luck alone.
        line = np.arange(radius, image_size - radius + 1e-6)
        free = np.ones((len(line), len(line)), dtype=bool)
        for x, y, other in circles:
            # The extra pixel keeps two objects from sharing one at their rims.
            gap = radius + other + 1.0
            free &= (np.abs(line - x) >= gap)[None, :] | (np.abs(line - y) >= gap)[:, None]
        places = np.flatnonzero(free)
        if len(places) == 0:
            return None
        row, column = divmod(int(places[rng.integers(len(places))]), len(line))
        circles.append((float(line[column]), float(line[row]), radius))
    return circles


def _position(x: float, y: float) -> str:
    """Name the place of a centre given in shares of the scene's side."""
    vertical = "top" if y < 0.38 else "bottom" if y > 0.62 else ""
    horizontal = "left" if x < 0.38 else "right" if x > 0.62 else ""
    return f"{vertical} {horizontal}".strip() or "middle"


def _box(inside: Bools, corner: tuple[int, int]) -> tuple[int, int, int, int]:
    rows = np.flatnonzero(inside.any(axis=1))
    columns = np.flatnonzero(inside.any(axis=0))
    x, y = corner
    return (
        x + int(columns[0]),
        y + int(rows[0]),
        x + int(columns[-1]) + 1,
        y + int(rows[-1]) + 1,
    )


def _background(rng: np.random.Generator, image_size: int) -> tuple[Floats, str]:
    """Return a faintly tinted gradient, float32 (size, size, 3), and "dark" or "light"."""
    background = pick(rng, ("dark", "light"))
    level = rng.uniform(0.35, 0.5) if background == "dark" else rng.uniform(0.65, 0.92)
    tint = (level + rng.uniform(-0.06, 0.06, size=3)).astype(np.float32)
    slope = rng.uniform(-0.12, 0.12, size=2).astype(np.float32)
    line = np.linspace(-1.0, 1.0, image_size, dtype=np.float32)
    ramp = slope[0] * line[:, None] + slope[1] * line[None, :]
    return tint + ramp[..., None], background


def _render(
    rng: np.random.Generator,
    look: Look,
    scans: DigitScans,
    centre: tuple[float, float],
    radius: float,
    image_size: int,
) -> tuple[tuple[int, int], Floats, Floats]:
    """Render one object in a window of the scene.

    Returns:
        The window's (x, y) corner, the coverage (rows, columns) in [0, 1] and the ink: the
        colour of each pixel (rows, columns, 3).
    """
    x, y = centre
    left, top = max(math.floor(x - radius), 0), max(math.floor(y - radius), 0)
    right, bottom = (min(math.ceil(c + radius), image_size) for c in (x, y))
    columns, rows = right - left, bottom - top
    colour = np.array(COLOURS[look.colour], dtype=np.float32)
    colour = np.clip(colour + rng.uniform(-0.08, 0.08, size=3), 0, 1).astype(np.float32)
    if look.scan is not None:
        cover = _ink(scans.images[look.scan], columns, rows)
        return (left, top), cover, np.broadcast_to(colour, (rows, columns, 3))

    step = 1.0 / _SUPERSAMPLE
    across = np.arange(columns * _SUPERSAMPLE, dtype=np.float32) * step + (left + step / 2 - x)
    down = np.arange(rows * _SUPERSAMPLE, dtype=np.float32) * step + (top + step / 2 - y)
    angle = rng.uniform(-0.1, 0.1)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u = across[None, :] * cos + down[:, None] * sin
    v = down[:, None] * cos - across[None, :] * sin
    inside = _shape(look.name, u / radius, v / radius)
    scale = image_size / _DESIGN_SIZE
    if look.texture == "outlined":
        painted = ~_shape(look.name, u / radius * 1.5, v / radius * 1.5)
    else:
        jitter = rng.uniform(-1.0, 1.0, size=2) * _PHASE_JITTER
        painted = _pattern(
            look.texture,
            ((across + x) / scale + jitter[0])[None, :] / _PERIOD,
            ((down + y) / scale + jitter[1])[:, None] / _PERIOD,
        )
    # The pattern's second tone stands out from the background too: with holes for a pattern, a
    # person could not tell a small star from a small cross.
    second = colour * 0.15
    share = _shrink(painted)[..., None]
    return (left, top), _shrink(inside), share * colour + (1 - share) * second


def _shrink(fine: Bools) -> Floats:
    """Average (rows * s, columns * s) down to (rows, columns)."""
    rows, columns = fine.shape[0] // _SUPERSAMPLE, fine.shape[1] // _SUPERSAMPLE
    blocks = fine.reshape(rows, _SUPERSAMPLE, columns, _SUPERSAMPLE)
    means: Floats = blocks.mean(axis=(1, 3), dtype=np.float32)
    return means


def _ink(scan: Floats, columns: int, rows: int) -> Floats:
    """Upscale a scan to (rows, columns), ink in [0, 1]."""
    resized = Image.fromarray(scan).resize((columns, rows), Image.Resampling.BICUBIC)
    ink: Floats = np.clip(1.3 * np.asarray(resized, dtype=np.float32), 0.0, 1.0)
    return ink


def _shape(name: str, u: Floats, v: Floats) -> Bools:
    """Say which points are inside a shape that fits the unit circle; v points down."""
    if name == "circle":
        return u * u + v * v <= 0.92
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.76
    if name == "triangle":
        return (v <= 0.62) & (1.732 * np.abs(u) - v <= 0.95)
    if name == "star":
        # Fold the plane onto half a point of the star, where its edge is one straight line from
        # the tip (radius 1) to the notch (radius 0.5).
        fifth = 2 * math.pi / 5
        turn = np.abs(np.mod(np.arctan2(u, -v) + fifth / 2, fifth) - fifth / 2)
        far = np.hypot(u, v)
        notch_x, notch_y = 0.5 * math.cos(fifth / 2), 0.5 * math.sin(fifth / 2)
        along, aside = far * np.cos(turn), far * np.sin(turn)
        edge: Bools = (along - 1.0) * notch_y + aside * (1.0 - notch_x) <= 0.0
        return edge
    if name == "cross":
        thin, long = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return (thin <= 0.38) & (long <= 0.92)
    if name == "heart":
        x, y = 1.25 * u, 0.15 - 1.25 * v
        round_part = x * x + y * y - 1.0
        heart: Bools = round_part * round_part * round_part <= x * x * y * y * y
        return heart
    raise ValueError(f"unknown shape {name!r}; one of {', '.join(SHAPES)}")


def _pattern(texture: str | None, across: Floats, down: Floats) -> Bools:
    """Say which points carry the object's own colour.

    Args:
        texture: one of `TEXTURES` except "outlined".
        across: horizontal place in periods of the pattern, shape (1, columns).
        down: vertical place in periods, shape (rows, 1).

    Returns:
        Shape (rows, columns).
    """
    shape = (down.shape[0], across.shape[1])
    x, y = np.mod(across, 1.0), np.mod(down, 1.0)
    if texture == "plain":
        return np.ones(shape, dtype=bool)
    if texture == "striped":
        return np.broadcast_to(y < 0.5, shape)
    if texture == "checkered":
        return (x < 0.5) ^ (y < 0.5)
    painted: Bools
    if texture == "hatched":
        painted = np.mod(x + y, 1.0) < 0.5
    elif texture == "dotted":
        painted = (x - 0.5) ** 2 + (y - 0.5) ** 2 > 0.09
    else:
        raise ValueError(f"unknown texture {texture!r}; one of {', '.join(TEXTURES)}")
    return painted
