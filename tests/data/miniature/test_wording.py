import re
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_vision.data.miniature.scenes import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Scene,
    draw_scene,
    random_look,
    split_digit_scans,
)
from hive_vision.data.miniature.wording import (
    LONGEST,
    NUMERALS,
    SHAPE_NOUNS,
    SHORTEST,
    SIZE_ADJECTIVES,
    TEXTURE_ADJECTIVES,
    TEXTURE_ENDINGS,
    with_article,
    write_caption,
    write_coarse_caption,
)

SCANS, _ = split_digit_scans(0)
# The only words of a coarse caption that are neither a colour nor a kind.
COARSE_FILLERS = {
    *("a", "an", "picture", "image", "photo", "of", "there", "is"),
    *("and", "next", "to", "with", "beside", "together", "as", "well"),
}
SEEDS = st.integers(0, 10**6)


def scene_and_rng(seed) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng(seed)
    looks = [random_look(rng, SCANS) for _ in range(1 + seed % 3)]
    return draw_scene(rng, looks, SCANS, 24), rng


def named(table, phrase):
    """The values of a table of wordings that a phrase states; the longest wording counts."""
    forms = sorted(((form, key) for key, forms in table.items() for form in forms), key=len)
    found = set()
    for form, key in sorted(forms, key=lambda pair: -len(pair[0])):
        if re.search(rf"\b{form}\b", phrase):
            found.add(key)
            phrase = phrase.replace(form, "")
    return found


@given(seed=SEEDS)
@settings(max_examples=150, deadline=None)
def test_spans_hold_each_objects_own_noun_phrase(seed):
    scene, rng = scene_and_rng(seed)
    caption = write_caption(rng, scene)
    assert len(caption.spans) == len(scene.things)
    for thing, (start, end) in zip(scene.things, caption.spans, strict=True):
        phrase = caption.text[start:end].lower()
        assert re.match(r"an? ", phrase)
        # Whole words, and nothing of what stands around them.
        assert re.search(r"\w$", phrase)
        assert re.search(r"(^|\W)$", caption.text[:start])
        assert re.match(r"\W|$", caption.text[end:])
        assert named({colour: (colour,) for colour in COLOURS}, phrase) <= {thing.colour}
        assert named(SIZE_ADJECTIVES, phrase) <= {thing.size}
        if thing.kind == "shape":
            assert named(SHAPE_NOUNS, phrase) <= {thing.name}
            textures = {
                key: TEXTURE_ADJECTIVES[key] + TEXTURE_ENDINGS[key] for key in TEXTURE_ADJECTIVES
            }
            # "with a bold outline" and the like hold no other texture's word.
            assert named(textures, phrase) <= {thing.texture}
            assert re.search("shape|figure|" + "|".join(SHAPE_NOUNS[thing.name]), phrase)
        else:
            numbers = {str(n): (str(n), word) for n, word in enumerate(NUMERALS)}
            # "in one flat tone" is said of shapes only, so any number is the digit's value.
            assert named(numbers, phrase) <= {thing.name}
            assert re.search(rf"digit|number|{thing.name}|{NUMERALS[int(thing.name)]}", phrase)
    # Spans do not overlap.
    ordered = sorted(caption.spans)
    assert all(first[1] < second[0] for first, second in pairwise(ordered))


def test_lengths():
    """On one lone digit and on a crowd, the scenes with the shortest and the longest wordings."""
    looks = [random_look(np.random.default_rng(seed), SCANS, kind="shape") for seed in range(3)]
    digit = random_look(np.random.default_rng(0), SCANS, kind="digit")
    crowd = draw_scene(np.random.default_rng(0), looks, SCANS, 24)
    lone = draw_scene(np.random.default_rng(0), [digit], SCANS, 24)
    lengths = set()
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        lengths |= {len(write_caption(rng, scene).text.split()) for scene in (crowd, lone)}
    assert min(lengths) == SHORTEST
    assert 30 < max(lengths) <= LONGEST


@given(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_positions_and_relations_are_true(seed):
    scene, rng = scene_and_rng(seed)
    text = write_caption(rng, scene).text.lower()
    relations = re.sub("to the (left|right) of", "", text)
    said = set(re.findall(r"\b(top|bottom|left|right)\b", relations))
    assert said <= {word for thing in scene.things for word in thing.position.split()}
    if re.search("middle|centre", text):
        assert "middle" in {thing.position for thing in scene.things}
    if "background" in text or "ground" in text:
        assert scene.background in text


def test_relations_are_true():
    said = set()
    for seed in range(0, 900, 3):
        scene, rng = scene_and_rng(seed + 1)
        caption = write_caption(rng, scene)
        order = np.argsort([start for start, _ in caption.spans])
        between = caption.text[caption.spans[order[0]][1] : caption.spans[order[1]][0]].strip()
        (x, y), (u, v) = (
            (thing.box[0] + thing.box[2], thing.box[1] + thing.box[3])
            for thing in (scene.things[order[0]], scene.things[order[1]])
        )
        true = {
            "to the left of": x < u,
            "to the right of": x > u,
            "above": y < v,
            "below": y > v,
        }
        if between in true:
            said.add(between)
            assert true[between], caption.text
    assert said == set(true)


@given(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_coarse_captions_name_colours_and_kinds_only(seed):
    scene, rng = scene_and_rng(seed)
    words = re.findall(r"[a-z]+|\d+", write_coarse_caption(rng, scene).lower())
    assert sorted(w for w in words if w in COLOURS) == sorted(t.colour for t in scene.things)
    assert sorted(w for w in words if w in ("shape", "digit")) == sorted(
        t.kind for t in scene.things
    )
    rest = set(words) - set(COLOURS) - {"shape", "digit"}
    assert rest <= COARSE_FILLERS


def test_fine_captions_nearly_always_name_texture_and_shape():
    counts = dict.fromkeys(("shape", "texture", "size", "colour"), 0)
    shapes = total = 0
    for seed in range(400):
        scene, rng = scene_and_rng(seed)
        caption = write_caption(rng, scene)
        for thing, (start, end) in zip(scene.things, caption.spans, strict=True):
            phrase = caption.text[start:end].lower()
            total += 1
            counts["size"] += bool(named(SIZE_ADJECTIVES, phrase))
            counts["colour"] += thing.colour in phrase
            if thing.kind == "shape":
                shapes += 1
                counts["shape"] += bool(named(SHAPE_NOUNS, phrase))
                forms = TEXTURE_ADJECTIVES[thing.texture] + TEXTURE_ENDINGS[thing.texture]
                counts["texture"] += any(form in phrase for form in forms)
    assert 0.87 < counts["shape"] / shapes < 0.97
    assert 0.87 < counts["texture"] / shapes < 0.97
    assert 0.87 < counts["colour"] / total < 0.97
    assert 0.4 < counts["size"] / total < 0.6


def test_wording_varies():
    captions = set()
    scene, _ = scene_and_rng(2)
    for seed in range(100):
        captions.add(write_caption(np.random.default_rng(seed), scene).text)
    assert len(captions) > 95
    assert len({len(caption.split()) for caption in captions}) > 8


def test_tables_are_complete():
    assert set(SHAPE_NOUNS) == set(SHAPES)
    assert set(TEXTURE_ADJECTIVES) == set(TEXTURE_ENDINGS) == set(TEXTURES)


def test_articles():
    assert with_article("orange 8") == "an orange 8"
    assert with_article("8") == "an 8"
    assert with_article("eight") == "an eight"
    assert with_article("unpatterned star") == "an unpatterned star"
    assert with_article("one") == "a one"
    assert with_article("red star") == "a red star"
