"""Scores of VLM benchmarks side by side (the paper's Table 2)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hive_vision.evaluation.statistics import accuracy, all_differences
from hive_vision.evaluation.vlm_baselines import MAJORITY, blind, is_a_question
from hive_vision.evaluation.vlm_benchmarks import TaskResult
from hive_vision.reporting.tables import MISSING, Cell, Grid
from hive_vision.reporting.verdicts import leader, read_findings

# Method -> its runs, e.g. one for each seed -> task -> result.
VlmResults: TypeAlias = Mapping[str, Sequence[Mapping[str, TaskResult]]]
# Task -> first, second, mean, low and high of each difference, in points of the task.
Differences: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]


def methods_of(names: Iterable[str]) -> list[str]:
    """Leave out baselines, which are there to be beaten and never the best."""
    everyone = list(names)
    baselines = {MAJORITY, *(blind(name) for name in everyone)}
    return [name for name in everyone if name not in baselines]


def score_grid(results: VlmResults) -> Grid:
    """Put methods side by side, a row for each task.

    The best of a task is bold where the 95% interval of its difference from each other method
    leaves out zero.
    """
    rows = []
    findings = read_findings(_differences(results), scale=1.0)
    for task, highest in _tasks(results).items():
        scores = _scores(results, task)
        best = leader(methods_of(results), findings.get(task, ()))
        cells = [
            Cell(score_text(scores[method], highest), bold=method == best)
            if method in scores
            else Cell(MISSING)
            for method in results
        ]
        rows.append([Cell(f"{task} (of {highest:g})"), *cells])
    return Grid(["score", *results], rows)


def difference_grid(differences: Differences) -> Grid:
    """List what each method has more than its baselines and each method before it."""
    rows = []
    for task, found in differences.items():
        for d in found:
            text = f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
            is_certain = d["low"] > 0 or d["high"] < 0
            rows.append([Cell(task), Cell(f"{d['first']} - {d['second']}"), Cell(text, is_certain)])
    return Grid(["points", "", "with 95% interval"], rows)


def score_text(samples: NDArray[np.float64], highest: float) -> str:
    """Write a score with its spread over runs and over samples."""
    found = accuracy(samples)
    error = f"({highest * found.image_error:.1f})"
    if found.deviation is None:
        return f"{highest * found.mean:.1f} {error}"
    return f"{highest * found.mean:.1f} ±{highest * found.deviation:.1f} {error}"


def vlm_report(results: VlmResults) -> tuple[str, list[Grid]]:
    """Give the tables of a comparison, and what has to be said about them."""
    grids = [score_grid(results)]
    if len(results) > 1:
        grids.append(difference_grid(_differences(results)))
    runs = max(len(runs) for runs in results.values())
    over = f"± the standard deviation over {runs} runs; " if runs > 1 else ""
    note = (
        "Scores of lmms-eval; MME is the sum of perception and cognition. The spread: "
        f"{over}in brackets, the standard error over the samples of the task."
    )
    if len({len(runs) for runs in results.values()}) > 1:
        note += " Methods with different numbers of runs are not compared."
    return note, grids


def vlm_json(results: VlmResults) -> dict[str, Any]:
    """Give results and differences with every setting, ready for JSON."""
    return {
        "results": {
            method: [{task: result.to_json() for task, result in run.items()} for run in runs]
            for method, runs in results.items()
        },
        "differences": _differences(results),
    }


def _tasks(results: VlmResults) -> dict[str, float]:
    return {task: result.highest for runs in results.values() for task, result in runs[0].items()}


def _scores(results: VlmResults, task: str) -> dict[str, NDArray[np.float64]]:
    """(S, M) samples of each method's runs."""
    return {
        method: np.stack([run[task].samples for run in runs])
        for method, runs in results.items()
        if task in runs[0]
    }


def _differences(results: VlmResults) -> dict[str, list[dict[str, Any]]]:
    """Compare methods task by task, where all of them have as many runs."""
    differences = {}
    for task, highest in _tasks(results).items():
        scores = _scores(results, task)
        if len({values.shape for values in scores.values()}) == 1:
            differences[task] = [
                {
                    "first": first,
                    "second": second,
                    **{name: highest * getattr(d, name) for name in ("mean", "low", "high")},
                }
                for (first, second), d in all_differences(scores).items()
                if is_a_question(first, second, methods=scores)
            ]
    return differences
