import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from hive_vision.data.miniature.scenes import (
    COLOURS,
    DIGITS,
    KINDS,
    SHAPES,
    TEXTURES,
    draw_scene,
    random_look,
    split_digit_scans,
)

TRAIN, HELD_OUT = split_digit_scans(0)


def scene_of(seed, count=2, size=48, **fixed):
    rng = np.random.default_rng(seed)
    return draw_scene(rng, [random_look(rng, TRAIN, **fixed) for _ in range(count)], TRAIN, size)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 3), size=st.sampled_from([24, 48, 64]))
@settings(max_examples=60, deadline=None)
def test_boxes_are_the_masks_tight_bounds(seed, count, size):
    scene = scene_of(seed, count, size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == scene.mask.dtype == np.uint8
    assert set(np.unique(scene.mask)) == set(range(count + 1))
    for number, thing in enumerate(scene.things, start=1):
        rows, columns = np.nonzero(scene.mask == number)
        assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_boxes_do_not_overlap(seed, count):
    boxes = [thing.box for thing in scene_of(seed, count).things]
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        for u0, v0, u1, v1 in boxes[index + 1 :]:
            assert min(x1, u1) <= max(x0, u0) or min(y1, v1) <= max(y0, v0)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_position_agrees_with_the_box(seed):
    for thing in scene_of(seed).things:
        x, y = (thing.box[0] + thing.box[2]) / 96, (thing.box[1] + thing.box[3]) / 96
        words = thing.position.split()
        # The box of a lopsided digit is a little off its centre.
        assert "left" not in words or x < 0.5
        assert "right" not in words or x > 0.5
        assert "top" not in words or y < 0.5
        assert "bottom" not in words or y > 0.5
        assert "middle" not in words or (0.25 < x < 0.75 and 0.25 < y < 0.75)


@pytest.mark.parametrize("colour", COLOURS)
def test_things_have_their_colour(colour):
    others = np.array(list(COLOURS.values()))
    for seed in range(10):
        scene = scene_of(seed, 1, colour=colour, kind="shape", texture="plain")
        drawn = scene.image[scene.mask == 1].mean(0) / 255
        assert list(COLOURS)[int(np.abs(others - drawn).sum(1).argmin())] == colour


def test_sizes_differ():
    extent = {"small": [], "large": []}
    for seed in range(60):
        thing = scene_of(seed, 1, kind="shape", name="circle").things[0]
        extent[thing.size].append(thing.box[2] - thing.box[0])
    assert max(extent["small"]) < min(extent["large"])


@pytest.mark.parametrize("texture", TEXTURES)
def test_every_texture_is_unlike_the_others(texture):
    """The share of the primary colour and its runs along both axes tell the patterns apart."""
    changes = {}
    for name in TEXTURES:
        found = []
        for seed in range(12):
            scene = scene_of(seed, 1, kind="shape", name="square", colour="red", texture=name)
            if scene.things[0].size == "small":
                continue
            x0, y0, x1, y1 = scene.things[0].box
            inner = scene.image[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3, 0] > 110
            across = np.mean(inner[:, 1:] != inner[:, :-1])
            down = np.mean(inner[1:] != inner[:-1])
            found.append((inner.mean(), across, down))
        changes[name] = np.mean(found, axis=0)
    nearest = min(
        np.abs(changes[texture] - changes[other]).max() for other in TEXTURES if other != texture
    )
    assert nearest > 0.04


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_unlike_the_others(name):
    def outline(shape):
        total = np.zeros((12, 12))
        for seed in range(20):
            scene = scene_of(seed, 1, kind="shape", name=shape)
            x0, y0, x1, y1 = scene.things[0].box
            rows = np.linspace(y0, y1 - 1, 12).astype(int)
            columns = np.linspace(x0, x1 - 1, 12).astype(int)
            total += scene.mask[np.ix_(rows, columns)] == 1
        return total / 20

    own = outline(name)
    assert all(np.abs(own - outline(other)).mean() > 0.05 for other in SHAPES if other != name)


def test_digit_is_the_scan_it_names():
    """The mask, shrunk to the scan's size, looks like it."""
    digits, likeness = load_digits(), []
    for seed in range(20):
        scene = scene_of(seed, 1, kind="digit")
        thing = scene.things[0]
        assert digits.target[thing.scan] == int(thing.name)
        columns = np.flatnonzero(digits.images[thing.scan].max(0) > 6)
        rows = np.flatnonzero(digits.images[thing.scan].max(1) > 6)
        scan = digits.images[thing.scan][
            rows[0] : rows[-1] + 1,
            columns[0] : columns[-1] + 1,
        ]
        x0, y0, x1, y1 = thing.box
        drawn = Image.fromarray((scene.mask[y0:y1, x0:x1] * 255).astype(np.uint8))
        drawn = np.asarray(drawn.resize(scan.shape[::-1], Image.Resampling.BOX), dtype=float)
        likeness.append(np.corrcoef(drawn.ravel(), scan.ravel())[0, 1])
    assert np.mean(likeness) > 0.75


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_digit_scans_are_split(seed):
    train, held_out = split_digit_scans(seed)
    assert not set(train.ids) & set(held_out.ids)
    assert len(train.ids) + len(held_out.ids) == 1797
    for digit in range(10):
        share = np.sum(held_out.labels == digit) / (
            np.sum(held_out.labels == digit) + np.sum(train.labels == digit)
        )
        assert share == pytest.approx(0.3, abs=0.01)


def test_random_look_keeps_what_is_given():
    rng = np.random.default_rng(0)
    for _ in range(20):
        look = random_look(rng, TRAIN, kind="shape", name="star", texture="dotted", colour="red")
        assert (look.kind, look.name, look.texture, look.colour) == (
            "shape",
            "star",
            "dotted",
            "red",
        )
        digit = random_look(rng, TRAIN, kind="digit", name="7")
        assert TRAIN.labels[digit.scan] == 7
        assert digit.texture is None


def test_looks_cover_every_value():
    rng = np.random.default_rng(0)
    looks = [random_look(rng, TRAIN) for _ in range(600)]
    assert {look.kind for look in looks} == set(KINDS)
    assert {look.name for look in looks} == {*SHAPES, *DIGITS}
    assert {look.texture for look in looks} == {*TEXTURES, None}
    assert {look.colour for look in looks} == set(COLOURS)


def test_a_scene_is_a_function_of_its_seed():
    first, second, third = scene_of(5), scene_of(5), scene_of(6)
    assert np.array_equal(first.image, second.image)
    assert first.things == second.things
    assert not np.array_equal(first.image, third.image)
