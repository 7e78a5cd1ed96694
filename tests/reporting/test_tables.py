"""The table of methods, as it is read on a terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from hive_vision.reporting.tables import MISSING, Cell, Grid, method_table, side_by_side


def result(method: str, **other: Any) -> dict[str, Any]:
    return {
        "method": method,
        "held_out_loss": 1.23456,
        "held_out_loss_shuffled_images": 2.34567,
        "trained_parameters": 1234567,
        "stages": [{"seconds_per_step": 0.123}, {"seconds_per_step": 4.567}],
        "peak_memory_bytes": 3 * 2**29,
    } | other


def rendered(results: list[dict[str, Any]], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(method_table(results))
    return console.file.getvalue()


def row_of(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [method]]
    return line.split()


def test_numbers_and_their_units() -> None:
    text = rendered([result("hive")])
    assert row_of(text, "hive") == [
        *("hive", "1.235", "2.346", "1,234,567", "0.12/4.57", "1.50", "GiB")
    ]


def test_base_trains_nothing() -> None:
    base = result("base", stages=[], trained_parameters=0)
    del base["held_out_loss_shuffled_images"]
    row = row_of(rendered([base]), "base")
    assert row == ["base", "1.235", MISSING, "0", MISSING, "1.50", "GiB"]


def test_one_row_for_each_method_in_their_order() -> None:
    methods = ["base", "sa", "cascaded", "hive"]
    results = [result(m, trained_parameters=i) for i, m in enumerate(methods)]
    text = rendered(results)
    first_words = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert [word for word in first_words if word in methods] == methods
    for i, method in enumerate(methods):
        assert row_of(text, method)[3] == str(i)


def test_headings() -> None:
    text = rendered([result("hive")])
    for words in (
        *("method", "held-out", "caption", "loss", "images", "shuffled", "trained", "parameters"),
        *("seconds", "step", "peak", "memory"),
    ):
        assert words in text


@pytest.mark.parametrize(("width", "seconds"), [(80, 0.123), (100, 0.123), (100, 12.345)])
def test_no_number_is_cut(width: int, seconds: float) -> None:
    # A terminal is 80 columns wide unless somebody pulls at it; what is no terminal has 100.
    stages = [{"seconds_per_step": seconds}] * 3
    results = [result(method, stages=stages) for method in ("cascaded", "hive")]
    text = rendered(results, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert text.count("1,234,567") == 2
    assert text.count(f"{seconds:.3g}"[:4]) == 6


def test_markdown_and_terminal_say_the_same() -> None:
    grid = Grid(["a", "b"], [[Cell("x"), Cell("1.0", bold=True)], [Cell("y"), Cell("[2.0]")]])
    assert grid.to_markdown() == "| a | b |\n|---|---:|\n| x | **1.0** |\n| y | [2.0] |\n"
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(grid.to_rich())
    text = console.file.getvalue()
    assert "\x1b[1m  1.0\x1b[0m" in text
    assert "[2.0]" in text, "brackets are no markup"


def test_a_bar_in_a_cell_is_no_border() -> None:
    grid = Grid(["a"], [[Cell("x|y")], [Cell("z|", bold=True)]])
    assert grid.to_markdown().splitlines()[2:] == ["| x\\|y |", "| **z\\|** |"]


def test_text_columns_stand_to_the_left() -> None:
    assert "|---|---|" in Grid(["a", "b"], []).to_markdown(is_numeric=False)


def test_a_column_for_each_test() -> None:
    rows = [("x", "b - a", "1"), ("x", "c - a", "2"), ("y", "b - a", "3")]
    grid = side_by_side(Grid(["points", "", "d"], [[Cell(text) for text in row] for row in rows]))
    assert list(grid.headings) == ["points", "x", "y"]
    texts = [[cell.text for cell in row] for row in grid.rows]
    assert texts == [["b - a", "1", "3"], ["c - a", "2", MISSING]]
