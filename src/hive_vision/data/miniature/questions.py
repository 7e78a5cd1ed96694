"""Ask questions about scenes whose answers need the picture.

Every question comes from a list of candidates, of which the one asked least often with that
answer so far is taken. So the answers stay balanced within each kind of question, and a model
that does not look cannot do better than chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from hive_vision.data.miniature.scenes import (
    COLOURS,
    DIGITS,
    KINDS,
    SHAPES,
    TEXTURES,
    Thing,
    pick,
)

QUESTION_TYPES = ("existence", "counting", "attribute", "relation")
DIRECTIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        text: the question.
        answer: one word, or a numeral.
        type: one of `QUESTION_TYPES`.
        form: what the answers are balanced within, for example "colour" or "above".
    """

    text: str
    answer: str
    type: str
    form: str


class Questioner:
    """Asks one question a call, keeping the answers of each form balanced over its calls."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._asked: Counter[tuple[str, str, str]] = Counter()

    def ask(self, things: Sequence[Thing]) -> Question:
        """Return a question about a scene with these objects, of the type asked least so far."""
        candidates = [
            *existence(self._rng, things),
            *_counting(things),
            *_attribute(things),
            *_relation(things),
        ]
        # Ties are broken at random: the order of the list above must not decide.
        shuffled = [candidates[i] for i in self._rng.permutation(len(candidates))]
        chosen: Question = min(shuffled, key=self._times_asked)
        self._asked[(chosen.type, "", "")] += 1
        self._asked[(chosen.type, chosen.form, "")] += 1
        self._asked[(chosen.type, chosen.form, chosen.answer)] += 1
        return chosen

    def _times_asked(self, question: Question) -> tuple[int, int, int]:
        return (
            self._asked[(question.type, "", "")],
            self._asked[(question.type, question.form, question.answer)],
            self._asked[(question.type, question.form, "")],
        )


def describe(thing: Thing, leave_out: str = "") -> str:
    """Word an object without an article by all its attributes but one: "red striped star".

    Args:
        thing: the object.
        leave_out: "colour", "texture" or "name", or "" for none.

    Returns:
        The words. A left-out shape is a "shape", a left-out digit a "digit".
    """
    words = [] if leave_out == "colour" else [thing.colour]
    if thing.texture is not None and leave_out != "texture":
        words.append(thing.texture)
    return " ".join([*words, thing.kind if leave_out == "name" else thing.name])


def existence(rng: np.random.Generator, things: Sequence[Thing]) -> list[Question]:
    """Ask for one thing that is there and one that is not, drawn from the same distribution."""
    thing = things[int(rng.integers(len(things)))]
    form = pick(rng, ("name", "colour", "texture") if thing.kind == "shape" else ("name", "colour"))
    if form == "name":
        options: Sequence[str] = SHAPES if thing.kind == "shape" else DIGITS
        present = {other.name for other in things}
        phrase = "{} {{}}".format("a" if thing.kind == "shape" else "the digit")
        there = thing.name
    elif form == "colour":
        options = tuple(COLOURS)
        present = {other.colour for other in things if other.kind == thing.kind}
        phrase = f"any {{}} {thing.kind}"
        there = thing.colour
    else:
        options = TEXTURES
        present = {str(other.texture) for other in things}
        phrase = "any {} shape"
        there = str(thing.texture)
    absent = pick(rng, [option for option in options if option not in present])
    return [
        Question(f"is there {phrase.format(there)}?", "yes", "existence", form),
        Question(f"is there {phrase.format(absent)}?", "no", "existence", form),
    ]


def _counting(things: Sequence[Thing]) -> list[Question]:
    counts = {f"{kind}s": sum(thing.kind == kind for thing in things) for kind in KINDS}
    counts["objects"] = len(things)
    # Three of one kind are too rare for that answer to be as frequent as the others.
    return [
        Question(f"how many {what} are there?", str(count), "counting", what)
        for what, count in counts.items()
        if count < 3 or what == "objects"
    ]


def _attribute(things: Sequence[Thing]) -> list[Question]:
    """Ask for one attribute of an object that the rest of its attributes single out."""
    questions = []
    for thing in things:
        for form in ("colour", "texture", "name"):
            answer = {"colour": thing.colour, "texture": thing.texture, "name": thing.name}[form]
            reference = describe(thing, leave_out=form)
            alike = [other for other in things if describe(other, leave_out=form) == reference]
            if answer is None or len(alike) > 1:
                continue
            if form == "colour":
                text = f"what colour is the {reference}?"
            elif form == "texture":
                text = f"what pattern does the {reference} have?"
            elif thing.kind == "shape":
                text = f"which figure is the {reference}?"
            else:
                text = f"which number is the {reference}?"
            kind = f"{thing.kind} {form}" if form == "name" else form
            questions.append(Question(text, answer, "attribute", kind))
    return questions


def _relation(things: Sequence[Thing]) -> list[Question]:
    """Ask where one object is as seen from another, where that is clear-cut."""
    named = Counter(describe(thing) for thing in things)
    unique = {describe(thing): thing for thing in things if named[describe(thing)] == 1}
    questions = []
    for (first_words, first), (second_words, second) in permutations(unique.items(), 2):
        for direction, step in DIRECTIONS.items():
            towards = is_towards(first, second, step)
            if towards is not None:
                text = f"is the {first_words} {direction} the {second_words}?"
                questions.append(Question(text, "yes" if towards else "no", "relation", direction))
    return questions


def is_towards(first: Thing, second: Thing, step: tuple[int, int]) -> bool | None:
    """Say whether `first` lies in a direction from `second`; None where they overlap in it."""
    axis = 0 if step[0] else 1
    before = first.box[axis + 2] <= second.box[axis]
    after = first.box[axis] >= second.box[axis + 2]
    if not before and not after:
        return None
    return before if step[axis] < 0 else after
