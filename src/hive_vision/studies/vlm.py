"""VLMs side by side on benchmarks, with the baselines that they must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from hive_vision.evaluation.vlm_baselines import MAJORITY, blind, blind_copies, majority_answers
from hive_vision.evaluation.vlm_benchmarks import EvaluateArguments, TaskResult, evaluate_vlm

# Method -> its runs -> task -> result.
Results: TypeAlias = dict[str, list[dict[str, TaskResult]]]


def compare_vlms(
    models: Mapping[str, Sequence[str]], output: Path, arguments: EvaluateArguments
) -> Results:
    """Evaluate every model on every task; what is done is not done again.

    Args:
        models: Method -> folders or hub ids of its runs.
        output: A folder in it for each run's logs and results.
        arguments: Tasks and numbers.

    Returns:
        A list of results for each method; with baselines ``majority``, as often as there are runs
        of the first method, and ``blind NAME`` for each method.

    Raises:
        ValueError: If lmms-eval or data is not there.
        RuntimeError: If it gave no results, or failed on samples.
    """
    results: Results = {}
    if arguments.baselines:
        assert arguments.data is not None
        runs = len(next(iter(models.values())))
        results[MAJORITY] = [majority_answers(Path(arguments.data), arguments.tasks)] * runs
        copies = blind_copies(Path(arguments.data), output / "blind-copies")
        without_images = replace(arguments, data=str(copies))
        for method, folders in models.items():
            results[blind(method)] = _evaluated(f"blind-{method}", folders, output, without_images)
    for method, folders in models.items():
        results[method] = _evaluated(method, folders, output, arguments)
    return results


def _evaluated(
    method: str, folders: Sequence[str], output: Path, arguments: EvaluateArguments
) -> list[dict[str, TaskResult]]:
    names = [method] if len(folders) == 1 else [f"{method}-{n}" for n in range(len(folders))]
    return [
        evaluate_vlm(folder, output / name, arguments)
        for name, folder in zip(names, folders, strict=True)
    ]
