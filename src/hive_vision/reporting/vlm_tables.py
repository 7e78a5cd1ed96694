"""Scores of VLM benchmarks side by side (the paper's Table 2)."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hive_vision.evaluation.statistics import Difference, accuracy, all_differences, best
from hive_vision.evaluation.vlm_baselines import is_a_question
from hive_vision.evaluation.vlm_benchmarks import TaskResult
from hive_vision.reporting.tables import MISSING, Cell, Grid

# Method -> its runs, e.g. one for each seed -> task -> result.
VlmResults: TypeAlias = Mapping[str, Sequence[Mapping[str, TaskResult]]]


def score_grid(results: VlmResults) -> Grid:
    """Put methods side by side, a row for each task.

    The best of a task is bold where the 95% interval of its difference from each other method
    leaves out zero.
    """
    rows = []
    for task, highest in _tasks(results).items():
        scores = _scores(results, task)
        leader = best(scores) if _paired(scores) else None
        cells = [
            Cell(score_text(scores[method], highest), bold=method == leader)
            if method in scores
            else Cell(MISSING)
            for method in results
        ]
        rows.append([Cell(f"{task} (of {highest:g})"), *cells])
    return Grid(["score", *results], rows)


def difference_grid(results: VlmResults) -> Grid:
    """List what each method has more than its baselines and each method before it."""
    rows = []
    for task, highest in _tasks(results).items():
        scores = _scores(results, task)
        if not _paired(scores):
            continue
        for (first, second), d in _differences(scores).items():
            interval = f"[{highest * d.low:+.1f}, {highest * d.high:+.1f}]"
            text = f"{highest * d.mean:+.1f} {interval}"
            rows.append([Cell(task), Cell(f"{first} - {second}"), Cell(text, bold=d.is_certain)])
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
        grids.append(difference_grid(results))
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
    differences = {}
    for task, highest in _tasks(results).items():
        scores = _scores(results, task)
        if _paired(scores):
            differences[task] = [
                {
                    "first": first,
                    "second": second,
                    **{name: highest * getattr(d, name) for name in ("mean", "low", "high")},
                }
                for (first, second), d in _differences(scores).items()
            ]
    return {
        "results": {
            method: [{task: result.to_json() for task, result in run.items()} for run in runs]
            for method, runs in results.items()
        },
        "differences": differences,
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


def _differences(
    scores: Mapping[str, NDArray[np.float64]],
) -> dict[tuple[str, str], Difference]:
    return {
        pair: found
        for pair, found in all_differences(scores).items()
        if is_a_question(*pair, methods=scores)
    }


def _paired(scores: Mapping[str, NDArray[np.float64]]) -> bool:
    return len({values.shape for values in scores.values()}) == 1
