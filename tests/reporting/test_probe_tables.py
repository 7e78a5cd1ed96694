"""Accuracies and differences as they are read: in a terminal, as Markdown and as JSON."""

import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from hive_vision.evaluation.probe import ProbeResult
from hive_vision.evaluation.statistics import paired_difference
from hive_vision.reporting.probe_tables import (
    accuracy_grid,
    accuracy_text,
    difference_grid,
    how_found,
    interpolation_report,
    layer_report,
    probe_report,
    results_json,
    search_grid,
    to_markdown,
)
from hive_vision.reporting.tables import Cell, Grid

SETTINGS = {"probe": "linear", "protocol": "fast", "layer": 12, "depth": 12, "pooling": "mean"}


def result(
    share: float, seeds: int = 3, images: int = 1000, data: str = "texture", **settings: object
) -> ProbeResult:
    """About that share of the images is correct, not the same with each seed."""
    random = np.random.default_rng(round(1000 * share) + seeds)
    correct: NDArray[np.bool_] = random.random((max(seeds, 1), images)) < share
    return ProbeResult("x", data, correct, tuple(range(seeds)), {**SETTINGS, **settings})


def drawn(grid: Grid, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    console.print(grid.to_rich())
    return console.file.getvalue()


def test_an_accuracy_has_both_spreads() -> None:
    correct = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    found = ProbeResult("x", "d", correct, (0, 1), SETTINGS)
    # Mean 5/8; seeds 3/4 and 2/4; images 1, 1, 1/2, 0.
    deviation = np.std([75, 50], ddof=1)
    error = np.std([100, 100, 50, 0], ddof=1) / 2
    assert accuracy_text(found) == f"62.5 ±{deviation:.1f} ({error:.1f})"
    alone = ProbeResult("x", "d", correct[:1], (), SETTINGS)
    assert accuracy_text(alone) == "75.0 (25.0)"


def test_bold_only_where_the_interval_says_so() -> None:
    clear = {"base": {"texture": result(0.5)}, "hive": {"texture": result(0.9)}}
    (row,) = accuracy_grid(clear).rows
    assert [cell.bold for cell in row] == [False, False, True]
    close = {"base": {"texture": result(0.5)}, "hive": {"texture": result(0.501)}}
    (row,) = accuracy_grid(close).rows
    assert not any(cell.bold for cell in row)
    (difference,) = difference_grid(close).rows
    assert not difference[-1].bold


def test_differences_are_those_of_the_statistics() -> None:
    first, second = result(0.5), result(0.9)
    (row,) = difference_grid({"base": {"texture": first}, "hive": {"texture": second}}).rows
    expected = paired_difference(second.correct, first.correct)
    assert [cell.text for cell in row[:2]] == ["texture", "hive - base"]
    mean, low, high = (100 * v for v in (expected.mean, expected.low, expected.high))
    assert row[2] == Cell(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", bold=True)


def test_four_methods_fit_into_a_terminal() -> None:
    by_set = {"shape_texture": result(1.0, data="shape_texture")}
    grid = accuracy_grid(dict.fromkeys(("base", "sa", "cascaded", "hive"), by_set))
    assert "100.0 ±0.0 (0.1)   100.0 ±0.0 (0.1)" in drawn(grid, 100)
    narrow = drawn(grid, 80)  # in two lines, but whole
    assert "…" not in narrow
    assert narrow.count("±0.0") == narrow.count("(0.1)") == 4


def test_the_note_says_how_and_what_the_spread_is() -> None:
    several = {"base": {"texture": result(0.5)}}
    note, grids = probe_report(several)
    assert len(grids) == 1, "nothing to compare with"
    assert "Linear probe, protocol fast, mean of the patch tokens of the last layer" in note
    assert "standard deviation over 3 seeds" in note
    assert "1,000 test images" in note
    note, _ = probe_report({"base": {"texture": result(0.5, 0, probe="knn", neighbours=5)}})
    assert "5 nearest neighbours" in note
    assert "deviation" not in note


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"probe": "attentive"}, "Attentive probe, protocol fast, all tokens of the last layer"),
        ({"layer": 11}, "of layer 11 of 12"),
        ({"pooling": "cls"}, "class token"),
        ({"pooling": "head"}, "own pooling head"),
        ({"probe": "zero_shot", "templates": ["a {}"]}, "templates ['a {}']"),
        ({"probe": "retrieval"}, "recall at 1, 5 and 10"),
    ],
)
def test_how_a_result_was_found(settings: dict[str, object], words: str) -> None:
    assert words in how_found(result(0.5, **settings))


def test_layers_of_encoders_of_different_depth() -> None:
    layers = {"base": [result(0.5), result(0.6)], "hive": [result(0.9)]}
    note, (grid,) = layer_report({"texture": layers})
    assert [row[0].text for row in grid.rows] == ["1", "2"]
    assert grid.rows[0][2].bold
    assert grid.rows[1][2] == Cell("-")
    assert "each layer" in note


def test_interpolation_has_a_row_for_each_alpha() -> None:
    values = {"linear": [result(0.5), result(0.6)], "zero_shot": [result(0.2, 0), result(0.1, 0)]}
    note, (grid,) = interpolation_report([0, 1], {"texture": values})
    assert [row[0].text for row in grid.rows] == ["0", "1"]
    assert grid.headings == ["texture: alpha", "linear", "zero_shot"]
    assert "0 is the base" in note


def test_the_search_shows_what_was_chosen() -> None:
    found = {"hive": {"chosen": "b", "held_out_accuracy": {"a": 0.5, "b": 0.75}}}
    (row,) = search_grid(found).rows
    assert row == [Cell("hive"), Cell("50.0"), Cell("75.0", bold=True)]


def test_json_has_everything_and_reads_back() -> None:
    results = {"base": {"texture": result(0.5)}, "hive": {"texture": result(0.9)}}
    content = json.loads(json.dumps(results_json(results)))
    again = ProbeResult.from_json(content["results"]["hive"]["texture"])
    np.testing.assert_array_equal(again.correct, results["hive"]["texture"].correct)
    (difference,) = content["differences"]["texture"]
    assert (difference["first"], difference["second"]) == ("hive", "base")


def test_a_report_as_markdown_ends_with_its_note() -> None:
    note, grids = probe_report({"base": {"texture": result(0.5)}})
    text = to_markdown(note, grids)
    assert text.startswith("| accuracy, % | base |")
    assert text.endswith(f"{note}\n")
