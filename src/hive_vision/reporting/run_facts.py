"""What is known of a run, finished or not, from the files in its folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_vision.folders import MANIFEST, read_json

_LONG = 80  # characters in a cell


@dataclass(frozen=True)
class Stage:
    """How far a stage came.

    Attributes:
        name: Its name.
        planned: Steps that it should have; ``None`` if only epochs were given.
        result: Its losses and update proof; ``None`` while it is not finished.
        log: Its lines of ``metrics.jsonl``.
    """

    name: str
    planned: int | None
    result: Mapping[str, Any] | None
    log: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run of ``hive-vision pretrain`` or ``finetune``.

    Attributes:
        name: What it is called in a report.
        folder: Where it lies.
        recipe: ``recipe.yaml``.
        environment: ``environment.json``; empty if there is none.
        results: ``results.json``; ``None`` while the run is not finished.
        stages: Those that began, in their order.
        planned: Names of the stages in the recipe.
        data: Stage -> what the manifests say of its data.
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Mapping[str, Any] | None
    stages: Sequence[Stage]
    planned: Sequence[str]
    data: Mapping[str, Mapping[str, Any]]

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.results is not None

    @property
    def is_vlm(self) -> bool:
        """Whether it is a fine-tuning run; only those of pre-training have a method."""
        return "method" not in self.recipe

    @property
    def method(self) -> str:
        """What was done."""
        return "vlm" if self.is_vlm else str(self.recipe["method"])

    @property
    def status(self) -> str:
        """How far it came, in words."""
        if self.is_finished:
            return "finished"
        if not self.stages:
            return "not finished: no step logged yet"
        last = self.stages[-1]
        if last.result is not None:
            return f"not finished: {last.name} of {', '.join(self.planned)} is done"
        of = f" of {last.planned}" if last.planned else ""
        return f"not finished: {last.name}, step {last.log[-1]['step']}{of}"

    @property
    def model(self) -> str | None:
        """Folder of what it left, below its own; ``None`` while there is nothing."""
        if self.results is None:
            return None
        return "model" if self.is_vlm else "encoder"


@dataclass(frozen=True)
class Series:
    """Runs that are one column of a table: one run, or those that differ in the seed."""

    name: str
    runs: Sequence[Run]

    def distinct(self, value: Callable[[Run], str]) -> str:
        """Join what is said of its runs, each text once; of many long ones the first."""
        texts = [text for text in dict.fromkeys(value(run) for run in self.runs) if text]
        joined = ", ".join(texts)
        if len(texts) > 2 and len(joined) > _LONG:
            return f"{texts[0]}, … ({len(texts)} in all)"
        return joined


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run."""
    return (folder / "recipe.yaml").is_file()


def read_run(folder: Path, name: str) -> Run:
    """Read a run's folder.

    Args:
        folder: A folder with a ``recipe.yaml``.
        name: What to call it.

    Raises:
        ValueError: If one of its files cannot be read.
    """
    recipe = read_recipe(folder / "recipe.yaml")
    planned = [key for key, value in recipe.items() if _is_stage(value)]
    results = read_facts(folder / "results.json")
    log = _read_log(folder / "metrics.jsonl")
    stages = []
    for stage in planned:
        lines = [line for line in log if line["stage"] == stage]
        result = read_facts(folder / stage / "result.json")
        if results is not None:  # what looked at the encoder afterwards is there only
            result = next((r for r in results["stages"] if r["name"] == stage), None)
        if result is not None or lines:
            steps = result["steps"] if result else recipe[stage].get("max_steps")
            stages.append(Stage(stage, steps, result, lines))
    environment = read_facts(folder / "environment.json") or {}
    data = _read_data(folder)
    return Run(name, folder, recipe, environment, results, stages, planned, data)


def read_facts(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; ``None`` if there is none.

    Raises:
        ValueError: If it cannot be read, or is no dictionary.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); restore it or leave the folder out"
        ) from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} is not a dictionary; restore it or leave the folder out")
    return content


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the recipe of a run as it was written.

    Raises:
        ValueError: If it cannot be read, or is none.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read ({reason}); restore it or leave the run out"
        ) from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe; restore it or leave the run out")
    return recipe


def _is_stage(value: Any) -> bool:
    return isinstance(value, Mapping) and "rules" in value


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Read the logged numbers; a last line that is being written does not count."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is no JSON ({error}); remove the line") from error


def _read_data(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what the manifests of a run's models and checkpoints say of its data."""
    found = {}
    patterns = ("*/checkpoint-*", "*/model", "model", "encoder")
    for manifest in (path for p in patterns for path in sorted(folder.glob(f"{p}/{MANIFEST}"))):
        content = read_facts(manifest) or {}
        if isinstance(content.get("data"), dict):
            found[str(content.get("stage", ""))] = content["data"]
    return dict(sorted(found.items()))  # finished or not, in the order of the stages
