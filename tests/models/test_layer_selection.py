"""Which encoder layers feed which language-model layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.models.layer_selection import (
    select_decoder_layers,
    select_encoder_layers,
    spread_evenly,
)


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [
        # The authors' lists (HIVE_florence.sh), there counted from 0.
        (24, 6, [4, 8, 12, 16, 20, 24]),
        (32, 6, [6, 12, 17, 22, 27, 32]),
        (40, 8, [5, 10, 15, 20, 25, 30, 35, 40]),
        (12, 3, [4, 8, 12]),
        (8, 2, [4, 8]),
        (5, 5, [1, 2, 3, 4, 5]),
        (7, 1, [7]),
    ],
)
def test_spread_is_the_authors_rule(num_layers: int, count: int, expected: list[int]) -> None:
    assert spread_evenly(num_layers, count) == expected


@st.composite
def depth_and_count(draw: st.DrawFn) -> tuple[int, int]:
    depth = draw(st.integers(1, 100))
    return depth, draw(st.integers(1, depth))


@given(depth_and_count())
def test_spread_takes_the_last_of_near_equal_groups_larger_first(sizes: tuple[int, int]) -> None:
    depth, count = sizes
    layers = spread_evenly(depth, count)
    groups = [last - before for before, last in zip([0, *layers], layers, strict=False)]
    assert len(layers) == count
    assert layers[-1] == depth
    assert min(groups) >= 1, "strictly increasing from 1"
    assert max(groups) - min(groups) <= 1
    assert groups == sorted(groups, reverse=True)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("uniform", [4, 8, 12, 16, 20, 24]),
        ("later", [19, 20, 21, 22, 23, 24]),
        ("last", [24] * 6),
        ([3, 23], [3, 23]),
        ((1, 2, 24), [1, 2, 24]),
    ],
)
def test_selections_of_the_papers_encoder(selection: object, expected: list[int]) -> None:
    assert select_encoder_layers(24, selection, 0.25) == expected


@given(
    st.integers(1, 100),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(["uniform", "later", "last"]),
)
def test_every_named_selection_has_the_density_and_reads_the_last_layer(
    depth: int, density: float, selection: str
) -> None:
    layers = select_encoder_layers(depth, selection, density)
    assert len(layers) == max(1, round(density * depth))
    assert layers == sorted(layers)
    assert layers[0] >= 1
    assert layers[-1] == depth
    if selection != "last":
        assert len(set(layers)) == len(layers)
    if selection == "later":
        assert layers == list(range(layers[0], depth + 1))


def test_full_density_takes_every_layer() -> None:
    everything = list(range(1, 13))
    assert select_encoder_layers(12, "uniform", 1.0) == everything
    assert select_encoder_layers(12, "later", 1.0) == everything


@pytest.mark.parametrize("density", [0, -0.25, 1.01])
def test_density_must_be_a_share(density: float) -> None:
    with pytest.raises(ValueError, match=rf"layer_density is {density}; it must be in \(0, 1\]"):
        select_encoder_layers(24, "uniform", density)


def test_density_is_not_read_when_the_layers_are_given() -> None:
    assert select_encoder_layers(24, [2, 4], 0) == [2, 4]


def test_unknown_selection_names_the_allowed_ones() -> None:
    message = "layer_selection is 'unifrom'; allowed are 'uniform', 'later', 'last' or a list"
    with pytest.raises(ValueError, match=message):
        select_encoder_layers(24, "unifrom", 0.25)


@pytest.mark.parametrize("layers", [[0, 4], [4, 25], [-1, 24]])
def test_explicit_layers_out_of_range(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="the encoder has layers 1 to 24, counted from 1"):
        select_encoder_layers(24, layers, 0.25)


@pytest.mark.parametrize("layers", [[], [4, 4], [8, 4]])
def test_explicit_layers_must_increase(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="give distinct layers in increasing order"):
        select_encoder_layers(24, layers, 0.25)


def test_decoder_layers_are_spread_or_taken_as_given() -> None:
    assert select_decoder_layers(32, 6) == [6, 12, 17, 22, 27, 32]
    assert select_decoder_layers(32, 3, [1, 2, 32]) == [1, 2, 32]


def test_too_few_decoder_layers() -> None:
    message = (
        "6 encoder layers are selected but the language model has only 4 layers; "
        "lower layer_density or choose a deeper language model"
    )
    with pytest.raises(ValueError, match=message):
        select_decoder_layers(4, 6)
    with pytest.raises(ValueError, match=message):
        select_decoder_layers(4, 6, [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("layers", [[], [1], [1, 2, 3], [2, 2], [2, 1]])
def test_explicit_decoder_layers_must_match_the_selection(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="give 2 distinct layers in increasing order, one for"):
        select_decoder_layers(4, 2, layers)


@pytest.mark.parametrize("layers", [[0, 4], [1, 5]])
def test_explicit_decoder_layers_out_of_range(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="the language model has layers 1 to 4, counted from 1"):
        select_decoder_layers(4, 2, layers)
