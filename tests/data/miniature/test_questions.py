import re
from collections import Counter

import numpy as np
import pytest

from hive_vision.data.miniature.questions import QUESTION_TYPES, Questioner, describe
from hive_vision.data.miniature.scenes import (
    COLOURS,
    TEXTURES,
    Thing,
    draw_scene,
    random_look,
    split_digit_scans,
)

SCANS, _ = split_digit_scans(0)


def scenes(count):
    for seed in range(count):
        rng = np.random.default_rng([9, seed])
        yield draw_scene(
            rng, [random_look(rng, SCANS) for _ in range(1 + seed % 3)], SCANS, 24
        ).things


def answer(question, things):
    """Answer a question from the objects alone, reading its words as a person would."""
    if found := re.fullmatch(r"how many (\w+) are there\?", question):
        what = found[1]
        return str(len([t for t in things if what == "objects" or what == t.kind + "s"]))
    if found := re.fullmatch(r"is there a (\w+)\?", question):
        return yes(any(t.name == found[1] for t in things))
    if found := re.fullmatch(r"is there the digit (\d)\?", question):
        return yes(any(t.name == found[1] for t in things))
    if found := re.fullmatch(r"is there any (\w+) (shape|digit)\?", question):
        word, kind = found.groups()
        assert word in {*COLOURS, *TEXTURES}
        return yes(any(t.kind == kind and word in (t.colour, t.texture) for t in things))
    if found := re.fullmatch(r"what colour is the (.+)\?", question):
        return the_one(found[1], things).colour
    if found := re.fullmatch(r"what pattern does the (.+) have\?", question):
        return the_one(found[1], things).texture
    if found := re.fullmatch(r"which (?:figure|number) is the (.+)\?", question):
        return the_one(found[1], things).name
    found = re.fullmatch(
        r"is the (.+) (to the left of|to the right of|above|below) the (.+)\?", question
    )
    first, second = the_one(found[1], things), the_one(found[3], things)
    dx = first.box[0] + first.box[2] - second.box[0] - second.box[2]
    dy = first.box[1] + first.box[3] - second.box[1] - second.box[3]
    return yes(
        {"to the left of": dx < 0, "to the right of": dx > 0, "above": dy < 0, "below": dy > 0}[
            found[2]
        ]
    )


def yes(truth):
    return "yes" if truth else "no"


def the_one(words, things):
    """The one object that has every property named."""
    fits = [t for t in things if set(words.split()) <= {t.kind, t.name, t.colour, t.texture or "-"}]
    assert len(fits) == 1, f"{words!r} fits {len(fits)} objects"
    return fits[0]


@pytest.fixture(scope="module")
def asked():
    questioner = Questioner(np.random.default_rng(0))
    return [(questioner.ask(things), things) for things in scenes(1600)]


def test_answers_are_recomputable_from_the_objects(asked):
    for question, things in asked:
        assert question.answer == answer(question.text, things), question


def test_types_are_balanced_where_the_scene_allows(asked):
    counts = Counter(question.type for question, _ in asked)
    assert set(counts) == set(QUESTION_TYPES)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_answers_are_balanced_within_each_form(asked):
    forms = {}
    for question, _ in asked:
        forms.setdefault((question.type, question.form), Counter())[question.answer] += 1
    for (type_, form), answers in forms.items():
        if type_ in ("existence", "relation"):
            assert set(answers) == {"yes", "no"}
            assert answers["yes"] == pytest.approx(answers["no"], rel=0.1, abs=3), form
        else:
            assert max(answers.values()) <= 1.3 * min(answers.values()) + 3, (form, answers)


def test_the_same_question_has_different_answers(asked):
    """Whoever answers by the question alone is right hardly more often than by chance.

    (Not 0.5: about ten answers to each question are more often six to four than five to five.)
    """
    answers = {}
    for question, _ in asked:
        if question.type == "existence":
            answers.setdefault(question.text, Counter())[question.answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / sum(sum(counts.values()) for counts in answers.values()) < 0.7


def test_describe_leaves_out_what_is_asked_for():
    thing = Thing("shape", "star", "red", "striped", "small", "top", (0, 0, 9, 9), None)
    assert describe(thing) == "red striped star"
    assert describe(thing, "colour") == "striped star"
    assert describe(thing, "texture") == "red star"
    assert describe(thing, "name") == "red striped shape"


def test_no_question_about_twins_names_one_of_them():
    twin = Thing("shape", "star", "red", "striped", "small", "left", (0, 0, 9, 9), None)
    other = Thing("shape", "star", "red", "striped", "small", "right", (20, 0, 29, 9), None)
    questioner = Questioner(np.random.default_rng(0))
    for _ in range(30):
        assert questioner.ask([twin, other]).type in ("existence", "counting")
