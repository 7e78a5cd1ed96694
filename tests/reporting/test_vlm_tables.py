from typing import Any

import numpy as np
import pytest

from hive_vision.evaluation.vlm_benchmarks import TaskResult
from hive_vision.reporting.vlm_tables import (
    methods_of,
    score_grid,
    score_text,
    vlm_json,
    vlm_report,
)


def result(task: str, share: float, highest: float = 100.0, count: int = 200) -> TaskResult:
    samples = (np.arange(count) < share * count).astype(float)
    return TaskResult(task, highest * share, highest, samples, {}, {"version": "1"}, ())


def runs(*shares: float) -> list[dict[str, TaskResult]]:
    return [{"gqa": result("gqa", share), "mme": result("mme", share, 800.0)} for share in shares]


def cells(grid: Any) -> dict[str, list[tuple[str, bool]]]:
    return {row[0].text: [(cell.text, cell.bold) for cell in row[1:]] for row in grid.rows}


def test_scores_have_their_scale_and_spread() -> None:
    samples = np.stack([run["mme"].samples for run in runs(0.5, 0.6)])
    assert score_text(samples, 800.0).startswith("440.0 ±56.6 (")
    assert score_text(samples[:1], 800.0).startswith("400.0 (")


def test_the_better_one_is_bold() -> None:
    grid = score_grid({"base": runs(0.5, 0.5), "hive": runs(0.7, 0.7)})
    assert list(cells(grid)) == ["gqa (of 100)", "mme (of 800)"]
    for row in cells(grid).values():
        assert [bold for _, bold in row] == [False, True]
    alike = score_grid({"base": runs(0.5, 0.6), "hive": runs(0.6, 0.5)})
    assert not any(bold for row in cells(alike).values() for _, bold in row)


def test_differences_are_in_points_of_the_task() -> None:
    results = {"base": runs(0.5), "hive": runs(0.6)}
    note, (_, differences) = vlm_report(results)
    texts = [[cell.text for cell in row] for row in differences.rows]
    assert texts[0][:2] == ["gqa", "hive - base"]
    assert texts[0][2].startswith("+10.0 [")
    assert texts[1][2].startswith("+80.0 [")
    assert "MME is the sum" in note
    (gqa,) = vlm_json(results)["differences"]["gqa"]
    assert gqa["mean"] == pytest.approx(10)
    assert gqa["low"] < 10 < gqa["high"]


def test_other_numbers_of_runs_are_shown_and_not_compared() -> None:
    note, grids = vlm_report({"base": runs(0.5), "hive": runs(0.6, 0.7)})
    assert "are not compared" in note
    assert not grids[1].rows
    assert not any(bold for row in cells(grids[0]).values() for _, bold in row)


def test_a_task_that_a_method_lacks() -> None:
    """As the majority answer of a task whose copy nobody knows."""
    lacking = [{"gqa": result("gqa", 0.3)}]
    grid = score_grid({"majority": lacking, "base": runs(0.4), "hive": runs(0.7)})
    assert cells(grid)["mme (of 800)"][0] == ("-", False)
    for row in cells(grid).values():
        assert [bold for _, bold in row] == [False, False, True]


def test_baselines_are_never_bold_and_no_rivals() -> None:
    """The same ones as in the report: see ``leader``."""
    grid = score_grid({"majority": runs(0.9), "base": runs(0.4), "hive": runs(0.7)})
    for row in cells(grid).values():
        assert [bold for _, bold in row] == [False, False, True]
    alone = score_grid({"blind hive": runs(0.2), "majority": runs(0.3), "hive": runs(0.7)})
    assert not any(bold for row in cells(alone).values() for _, bold in row)
    assert methods_of(["majority", "blind hive", "hive", "blind"]) == ["hive", "blind"]


def test_baselines_are_compared_with_what_must_beat_them() -> None:
    results = {
        "majority": runs(0.2),
        "blind base": runs(0.3),
        "blind hive": runs(0.3),
        "base": runs(0.5),
        "hive": runs(0.6),
    }
    _, (_, differences) = vlm_report(results)
    pairs = [row[1].text for row in differences.rows if row[0].text == "gqa"]
    assert pairs == [
        "base - majority",
        "hive - majority",
        "base - blind base",
        "hive - blind hive",
        "hive - base",
    ]
    assert len(vlm_json(results)["differences"]["gqa"]) == 5
