"""Word the miniature's captions: varied, correct, and with every object's noun phrase located."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hive_vision.data.miniature.scenes import Scene, Thing, pick

SHAPE_NOUNS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "heart": ("heart",),
}
TEXTURE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "unpatterned"),
    "striped": ("striped", "horizontally striped"),
    "checkered": ("checkered", "checked"),
    "dotted": ("dotted", "spotted"),
    "hatched": ("hatched", "diagonally striped"),
    "outlined": ("outlined", "bordered"),
}
TEXTURE_ENDINGS: dict[str, tuple[str, ...]] = {
    "plain": ("without a pattern", "in one flat tone"),
    "striped": ("with stripes", "with horizontal stripes"),
    "checkered": ("with a checkerboard pattern", "with a checkered pattern"),
    "dotted": ("with dots", "covered in spots"),
    "hatched": ("with diagonal lines", "with diagonal stripes"),
    "outlined": ("with a bold outline", "with a thick border"),
}
SIZE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHORTEST, LONGEST = 4, 40  # words in a caption

_OPENINGS = (
    "",
    "",
    "",
    "a picture of ",
    "an image of ",
    "an image showing ",
    "there is ",
    "we see ",
    "this scene shows ",
    "here is ",
    "the picture contains ",
)
_JOINERS = (" and ", " next to ", ", with ", " beside ", " together with ", " as well as ")
_CLOSINGS = (" on a {} background", " against a {} background", ", all on a {} ground")
_COARSE_OPENINGS = ("", "", "a picture of ", "an image of ", "a photo of ", "there is ")


@dataclass(frozen=True)
class Caption:
    """A caption and where it speaks of each object.

    Attributes:
        text: the caption.
        spans: per object, in the order of `Scene.things`, the half-open range of characters of
            `text` that its noun phrase covers.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


# A piece of a caption: its text, and which object's noun phrase it is (None: none).
Piece = tuple[str, int | None]


def write_caption(rng: np.random.Generator, scene: Scene) -> Caption:
    """Word a fine caption: nearly always shape and texture, often size and place.

    Args:
        rng: source of every random choice.
        scene: what to describe.

    Returns:
        A caption of `SHORTEST` to `LONGEST` words.
    """
    while True:
        pieces = _sentences(rng, scene) if rng.random() < 0.3 else _listing(rng, scene)
        if rng.random() < 0.15 and pieces[-1][0] != ".":
            pieces.append((pick(rng, _CLOSINGS).format(scene.background), None))
        caption = _assemble(rng, pieces, len(scene.things))
        if SHORTEST <= len(caption.text.split()) <= LONGEST:
            return caption


def write_coarse_caption(rng: np.random.Generator, scene: Scene) -> str:
    """Word a caption that names colours and kinds only: "a red shape and a blue digit"."""
    pieces: list[Piece] = [(pick(rng, _COARSE_OPENINGS), None)]
    for rank, index in enumerate(rng.permutation(len(scene.things))):
        thing = scene.things[index]
        if rank:
            pieces.append((_joiner(rng, rank, len(scene.things)), None))
        pieces.append((with_article(f"{thing.colour} {thing.kind}"), int(index)))
    return _assemble(rng, pieces, len(scene.things)).text


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase: "an orange 8", "a one"."""
    an = phrase[0] in "aeiou8" and not phrase.startswith(("one", "uni"))
    return f"{'an' if an else 'a'} {phrase}"


def noun_phrase(rng: np.random.Generator, thing: Thing) -> str:
    """Word one object with its article, its attributes in a random order and form."""
    before: list[str] = []
    after: list[str] = []
    if rng.random() < 0.92:
        if rng.random() < 0.12:
            after.append(pick(rng, ("in {}", "drawn in {}")).format(thing.colour))
        else:
            before.append(thing.colour)
    if thing.texture is not None and rng.random() < 0.92:
        if rng.random() < 0.35:
            after.append(pick(rng, TEXTURE_ENDINGS[thing.texture]))
        else:
            before.insert(int(rng.integers(len(before) + 1)), pick_adjective(rng, thing.texture))
    if rng.random() < 0.5:
        # Mostly first, as people say it: "a small red star".
        place = 0 if rng.random() < 0.8 else int(rng.integers(len(before) + 1))
        before.insert(place, pick(rng, SIZE_ADJECTIVES[thing.size]))
    return with_article(" ".join([*before, _noun(rng, thing), *after]))


def pick_adjective(rng: np.random.Generator, texture: str) -> str:
    """Return one of the adjectives for a texture."""
    return pick(rng, TEXTURE_ADJECTIVES[texture])


def _noun(rng: np.random.Generator, thing: Thing) -> str:
    if thing.kind == "shape":
        if rng.random() < 0.92:
            return pick(rng, SHAPE_NOUNS[thing.name])
        return pick(rng, ("shape", "figure"))
    if rng.random() >= 0.92:
        return pick(rng, ("digit", "handwritten digit", "number"))
    value = thing.name if rng.random() < 0.5 else NUMERALS[int(thing.name)]
    forms = ("{}", "{}", "digit {}", "number {}", "handwritten {}", "handwritten digit {}")
    return pick(rng, forms).format(value)


def _place_phrase(rng: np.random.Generator, position: str) -> str:
    if position == "middle":
        return pick(rng, ("in the middle", "in the centre", "at the centre"))
    if " " in position:
        return pick(rng, ("in the {} corner", "at the {}", "in the {}")).format(position)
    if position in ("left", "right"):
        return pick(rng, ("on the {}", "on the {} side", "at the {}")).format(position)
    return pick(rng, ("at the {}", "near the {}", "at the {} edge")).format(position)


def _joiner(rng: np.random.Generator, rank: int, count: int) -> str:
    """Return what stands before the object mentioned as number `rank` (from 0) of `count`."""
    return ", " if rank < count - 1 else pick(rng, _JOINERS)


def _listing(rng: np.random.Generator, scene: Scene) -> list[Piece]:
    """Word the scene as one list: opening, object, object and object."""
    pieces: list[Piece] = [(pick(rng, _OPENINGS), None)]
    order = [int(index) for index in rng.permutation(len(scene.things))]
    related = len(order) == 2 and rng.random() < 0.4
    for rank, index in enumerate(order):
        thing = scene.things[index]
        if rank:
            relation = _relation(scene.things[order[0]], thing) if related else None
            joiner = f" {relation} " if relation else _joiner(rng, rank, len(order))
            pieces.append((joiner, None))
        pieces.append((noun_phrase(rng, thing), index))
        if not related and rng.random() < (0.6 if len(order) < 3 else 0.35):
            pieces.append((" " + _place_phrase(rng, thing.position), None))
    return pieces


def _sentences(rng: np.random.Generator, scene: Scene) -> list[Piece]:
    """Word the scene as one short clause an object."""
    pieces: list[Piece] = []
    for rank, index in enumerate(rng.permutation(len(scene.things))):
        thing = scene.things[index]
        if rank:
            pieces.append((". ", None))
        place = _place_phrase(rng, thing.position)
        form = int(rng.integers(4))
        if form == 0:
            pieces += [(f"{place} there is ", None), (noun_phrase(rng, thing), int(index))]
        elif form == 1:
            verb = pick(rng, (" is ", " sits ", " lies "))
            pieces += [(noun_phrase(rng, thing), int(index)), (verb + place, None)]
        elif form == 2:
            pieces += [(f"{place}, ", None), (noun_phrase(rng, thing), int(index))]
        else:
            opening = "there is also " if rank else "there is "
            pieces += [(opening, None), (noun_phrase(rng, thing), int(index))]
    pieces.append((".", None))
    return pieces


def _relation(first: Thing, second: Thing) -> str | None:
    """Say where `first` is as seen from `second`, or None if that is not clear-cut."""
    if first.box[2] <= second.box[0]:
        return "to the left of"
    if first.box[0] >= second.box[2]:
        return "to the right of"
    if first.box[3] <= second.box[1]:
        return "above"
    if first.box[1] >= second.box[3]:
        return "below"
    return None


def _assemble(rng: np.random.Generator, pieces: Sequence[Piece], count: int) -> Caption:
    """Join pieces into a caption, half of them written with capitals and a full stop."""
    text = ""
    spans = [(0, 0)] * count
    for piece, index in pieces:
        if index is not None:
            spans[index] = (len(text), len(text) + len(piece))
        text += piece
    if rng.random() < 0.5:
        sentences = text.rstrip(".").split(". ")
        text = ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."
    return Caption(text, tuple(spans))
