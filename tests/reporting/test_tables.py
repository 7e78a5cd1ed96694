"""The table of methods, as it is read on a terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from hive_vision.reporting.tables import MISSING, method_table


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
