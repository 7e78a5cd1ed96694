"""The parts of a report about what was asked for: recipe, data, versions, hardware."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hive_vision.folders import flatten
from hive_vision.reporting.report import Block, Section, TitledTable
from hive_vision.reporting.run_facts import Run, Series
from hive_vision.reporting.tables import MISSING, Cell, Grid

_DIGITS = 16  # of a fingerprint; all 64 stand in the manifest
# Recipe keys that say which run it is, or that stand among the facts.
_NOT_LISTED = ("output", "seed", "method")


def setup_section(series: Sequence[Series]) -> Section:
    """Say what was run: recipe, data, versions, hardware."""
    facts = {name: [one.distinct(value) for one in series] for name, value in _FACTS.items()}
    facts = {name: texts for name, texts in facts.items() if any(texts)}
    same, different = _split(facts)
    blocks: list[Block] = []
    if different:
        blocks.append(_side_by_side("What differs", series, different))
    blocks.append(
        TitledTable(
            "What is the same for all" if len(series) > 1 else "The run",
            Grid(["", "value"], [[Cell(name), Cell(text)] for name, text in same.items()]),
            "The fingerprint of the data is written with its first "
            f"{_DIGITS} digits; manifest.json in the run's folder has all of them."
            if "data fingerprint" in facts
            else "",
            is_numeric=False,
        )
    )
    _, keys = _split(_recipe_keys(series))
    if keys:
        blocks.append(_side_by_side("Where the recipes differ", series, keys))
    return Section("What was run", blocks)


def recipe_section(series: Sequence[Series]) -> Section:
    """Write down every key of the recipes that is the same for all."""
    same, different = _split(_recipe_keys(series))
    rows = [[Cell(key), Cell(value)] for key, value in same.items()]
    note = "The keys that differ stand above, in “What was run”." if different else ""
    title = "recipe.yaml" + (", what all have in common" if len(series) > 1 else "")
    table = TitledTable(title, Grid(["key", "value"], rows), note, is_numeric=False)
    return Section("Recipe", [table])


def _data(run: Run) -> str:
    """Where the training data came from, also where it is several sources."""
    keys = flatten(run.recipe.get("data", {}))
    values = [value for key, value in keys.items() if key.rpartition(".")[2] == "train"]
    sources = [s for value in values for s in (value if isinstance(value, list) else [value])]
    texts = [str(s.get("path", s)) if isinstance(s, Mapping) else str(s) for s in sources]
    return ", ".join(dict.fromkeys(texts)) or _text(run.recipe.get("data", ""))


def _fingerprint(run: Run) -> str:
    prints = dict.fromkeys(str(facts["fingerprint"])[:_DIGITS] for facts in run.data.values())
    return ", ".join(prints)


def _samples(run: Run) -> str:
    texts = []
    for stage, facts in run.data.items():
        for unit in ("captions", "conversations"):
            if unit in facts:
                texts.append(f"{facts[unit]:,} {unit}" + (f" in {stage}" if run.is_vlm else ""))
    return ", ".join(dict.fromkeys(texts))


def _held_out(run: Run) -> str:
    held_out = (run.results or {}).get("held_out_captions")
    return "" if held_out is None else f"{held_out:,} captions"


def _unusable(run: Run) -> str:
    found = (run.results or {}).get("bad_samples", "")
    return str(sum(found.values())) if isinstance(found, Mapping) else str(found)


def _steps(run: Run) -> str:
    if run.is_finished and not run.stages:
        return "none: the encoder as it came"
    return ", ".join(
        f"{name}: {_planned(run, name)} x {run.recipe[name].get('batch_size', '?')}"
        for name in run.planned
    )


def _planned(run: Run, name: str) -> str:
    done = next((stage.planned for stage in run.stages if stage.name == name), None)
    steps = done or run.recipe[name].get("max_steps")
    return str(steps) if steps is not None else f"{run.recipe[name].get('epochs')} epochs"


def _version(run: Run) -> str:
    return str(run.environment.get("versions", {}).get("hive-vision", ""))


def _others(run: Run) -> str:
    versions = {"python": run.environment.get("python"), **run.environment.get("versions", {})}
    return ", ".join(f"{k} {v}" for k, v in versions.items() if v and k != "hive-vision")


def _device(run: Run) -> str:
    if not run.environment:
        return ""
    threads = run.environment.get("threads")
    return str(run.environment.get("device", "")) + (f", threads: {threads}" if threads else "")


_FACTS: dict[str, Callable[[Run], str]] = {
    "state": lambda run: run.status,
    "method": lambda run: run.method,
    "seed": lambda run: str(run.recipe.get("seed", "")),
    "encoder": lambda run: str(run.recipe.get("model", {}).get("vision", "")),
    "language model": lambda run: str(run.recipe.get("model", {}).get("language", "")),
    "training data": _data,
    "data fingerprint": _fingerprint,
    "trained on": _samples,
    "held out": _held_out,
    "unusable samples": _unusable,
    "steps x batch": _steps,
    "precision": lambda run: str(run.recipe.get("precision", "")),
    "hive-vision": _version,
    "versions": _others,
    "hardware": _device,
    "system": lambda run: str(run.environment.get("platform", "")),
    "what it left": lambda run: str(run.folder / run.model) if run.model else "",
}


def _split(facts: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """Tell what is the same for all series from what is not."""
    same = {name: texts[0] for name, texts in facts.items() if len(set(texts)) == 1}
    return same, {name: texts for name, texts in facts.items() if name not in same}


def _recipe_keys(series: Sequence[Series]) -> dict[str, list[str]]:
    flat = {id(run): flatten(run.recipe) for one in series for run in one.runs}
    keys = dict.fromkeys(key for recipe in flat.values() for key in recipe)
    return {
        key: [_distinct([flat[id(run)].get(key, MISSING) for run in one.runs]) for one in series]
        for key in keys
        if key not in _NOT_LISTED
    }


def _distinct(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(_text(value) for value in values))


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    return " ".join(str(value).split())


def _side_by_side(
    title: str, series: Sequence[Series], rows: Mapping[str, Sequence[str]]
) -> TitledTable:
    cells = [
        [Cell(name), *(Cell(text or MISSING) for text in texts)] for name, texts in rows.items()
    ]
    grid = Grid(["", *(one.name for one in series)], cells)
    return TitledTable(title, grid, is_numeric=False)
