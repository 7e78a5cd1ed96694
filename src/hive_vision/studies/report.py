"""The report of runs and results: told apart by their files, put together, written down."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from hive_vision.folders import write_text
from hive_vision.reporting.html import to_html
from hive_vision.reporting.model_card import to_model_card
from hive_vision.reporting.report import (
    Block,
    Paragraph,
    Points,
    Report,
    Section,
    TrainedModel,
    in_words,
)
from hive_vision.reporting.result_sections import (
    Found,
    figures_section,
    probe_section,
    vlm_section,
)
from hive_vision.reporting.run_facts import Series, is_run, read_facts, read_run
from hive_vision.reporting.run_sections import (
    curves_section,
    loss_section,
    proof_section,
    unfinished,
)
from hive_vision.reporting.run_setup import recipe_section, setup_section
from hive_vision.training.arguments import Method

PAGE, CARD = "report.html", "model_card.md"
_MAPS = "maps"  # the folder of a demo that has them
_ALLOWED = "pretrain, finetune, demo, compare, probe, evaluate or maps"
_METHODS: dict[Method, str] = {
    "base": "nothing is trained: the encoder as it came",
    "sa": "the language model reads image tokens before the caption, as LLaVA does",
    "cascaded": "the language model cross-attends to the encoder's last layer",
    "hive": "the language model cross-attends to encoder layers of matching depth",
}


@dataclass
class _Part:
    """What one folder brings.

    Attributes:
        folder: The folder.
        series: Its runs, with the folders that tell equal names apart.
        found: Its results.
        said: Sentences about it.
    """

    folder: Path
    series: list[Series] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def write_report(folders: Sequence[Path], output: Path) -> Report:
    """Write ``report.html`` and ``model_card.md``.

    Args:
        folders: Of runs and results.
        output: Where they go.

    Raises:
        ValueError: If a folder is none of those, or one of its files cannot be read.
        OSError: If nothing can be written there.
    """
    report = make_report(folders)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / PAGE, to_html(report))
    write_text(output / CARD, to_model_card(report))
    return report


def make_report(folders: Sequence[Path]) -> Report:
    """Put together what is known of runs and results.

    Args:
        folders: Of runs and results; each is told apart by its files.

    Raises:
        ValueError: If a folder is none of those, or one of its files cannot be read.
    """
    given = list({folder.resolve(): folder for folder in folders}.values())
    parts = [_read(folder) for folder in given]
    series = _told_apart(parts)
    found = [result for part in parts for result in part.found]
    sections = [_summary(parts, series, found), *(result.section for result in found)]
    sections += _run_sections(series)
    if series:
        sections += [setup_section(series), recipe_section(series)]
    names = in_words([folder.resolve().name for folder in given])
    runs = [run for one in series for run in one.runs]
    lead = f"From {in_words([str(folder) for folder in given])}."
    model = None
    if len(runs) == 1:
        of = runs[0].recipe.get("model", {})
        vision, language = str(of.get("vision")), str(of.get("language"))
        method = None if runs[0].is_vlm else runs[0].method
        model = TrainedModel("vlm" if runs[0].is_vlm else "encoder", vision, language, method)
    return Report(f"Report: {names}", lead, _unique(sections), model)


def _run_sections(series: Sequence[Series]) -> list[Section]:
    """What runs did; losses of pre-training and of fine-tuning are of other data and tokens."""
    kinds = {
        "pre-training": [one for one in series if not one.runs[0].is_vlm],
        "fine-tuning": [one for one in series if one.runs[0].is_vlm],
    }
    sections = []
    for make in (curves_section, loss_section, proof_section):
        for kind, own in kinds.items():
            section = make(own)
            if section is not None and all(kinds.values()):
                section = replace(section, title=f"{section.title}: {kind}")
            sections.append(section)
    return [section for section in sections if section is not None]


def _read(folder: Path) -> _Part:
    """Find out what a folder is, and read it.

    Raises:
        ValueError: If it is none that a report can be about.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{str(folder)!r} is no folder; give output folders of hive-vision {_ALLOWED}"
        )
    try:
        part = _known(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{str(folder)!r} has files of another form than this version writes ({what}); run the "
            "command that wrote them again, or leave the folder out"
        ) from error
    if part is None:
        runs = _runs_in(folder)
        if runs:
            raise ValueError(
                f"{str(folder)!r} only holds runs ({len(runs)}), and is not the output of one "
                f"command; give {_fix(folder, runs)}"
            )
        fix = f"did you mean {str(folder.parent)!r}?" if is_run(folder.parent) else "check the path"
        raise ValueError(
            f"{str(folder)!r} is neither a run nor results; give output folders of hive-vision "
            f"{_ALLOWED}; {fix}"
        )
    return part


def _fix(folder: Path, runs: Sequence[Path]) -> str:
    above = folder.resolve().parent
    if folder.resolve().name == "runs" and _study_series(above, []):
        return f"the study's folder, {os.path.relpath(above)!r}"
    return f"its runs, as in: hive-vision report {' '.join(map(str, runs[:2]))}"


def _known(folder: Path) -> _Part | None:
    if is_run(folder):
        return _Part(folder, [_one(folder)])
    content = read_facts(folder / "results.json")
    if content is None:
        return _unfinished_study(folder) or _unfinished_demo(folder)
    if "methods" in content and "probe" in content:
        return _demo(folder, content)
    if "kind" in content and content.keys() & {"figures", "tables", "sentences"}:
        title = str(content["kind"]).capitalize()
        return _Part(folder, found=[figures_section(content, folder, title)])
    results = content.get("results")
    if isinstance(results, dict) and any(isinstance(runs, list) for runs in results.values()):
        return _Part(folder, found=[vlm_section(content, "VLM benchmarks")])
    if content.keys() & {"results", "layers", "interpolation"}:
        settings = content.get("settings")  # only studies have them beside their results
        seeds = len(settings["seeds"]) if settings else None
        series = _study_series(folder, list(results or ())) if settings else []
        return _Part(folder, series, [probe_section(content, "Probes", seeds)])
    return None


def _demo(folder: Path, content: dict[str, Any]) -> _Part:
    methods = [result["method"] for result in content["methods"]]
    series = [_one(folder / method) for method in methods if is_run(folder / method)]
    found = [probe_section(content["probe"], "Probes", training_seeds=1)]
    if (folder / _MAPS / "results.json").is_file():
        maps = _known(folder / _MAPS)
        found += maps.found if maps is not None else []
    return _Part(folder, series, found)


def _unfinished_demo(folder: Path) -> _Part | None:
    runs = _runs_in(folder)
    if not {run.name for run in runs} <= {*get_args(Method)} or not runs:
        return None
    said = f"{folder.name} has runs, but no results: the command that makes them has not ended."
    return _Part(folder, [_one(run) for run in runs], said=[said])


def _runs_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if is_run(path)]


def _unfinished_study(folder: Path) -> _Part | None:
    series = _study_series(folder, [])
    if not series:
        return None
    said = f"The study {folder.name} is not finished: its accuracies are not there yet."
    return _Part(folder, series, said=[said])


def _study_series(folder: Path, labels: Sequence[str]) -> list[Series]:
    """The runs of a study, those of a method together, in the order of the labels."""
    runs = [run for run in (folder / "runs").glob("*-*") if is_run(run) and _seed(run).isdecimal()]
    runs.sort(key=lambda run: (run.name.rpartition("-")[0], int(_seed(run))))
    by_label: dict[str, list[Path]] = {label: [] for label in labels}
    for run in runs:
        by_label.setdefault(run.name.rpartition("-")[0], []).append(run)
    return [
        Series(label, [read_run(run, run.name) for run in own])
        for label, own in by_label.items()
        if own
    ]


def _seed(run: Path) -> str:
    return run.name.rpartition("-")[2]


def _one(folder: Path) -> Series:
    name = folder.resolve().name
    return Series(name, [read_run(folder, name)])


def _told_apart(parts: Iterable[_Part]) -> list[Series]:
    """All series, each run once; where two have the same name, with that of the folder above."""
    seen: set[Path] = set()
    chosen: list[Series] = []
    for part in parts:
        for one in part.series:
            folders = {run.folder.resolve() for run in one.runs}
            if not folders <= seen:
                chosen.append(one)
            seen |= folders
    names = [one.name for one in chosen]
    for above in (1, 2, 3):
        names = [
            name if names.count(name) == 1 else _longer(one, above)
            for name, one in zip(names, chosen, strict=True)
        ]
    return [_renamed(one, name) for one, name in zip(chosen, names, strict=True)]


def _longer(one: Series, above: int) -> str:
    folder = one.runs[0].folder.resolve()
    if len(one.runs) > 1:  # of a study: STUDY/runs/LABEL-SEED
        return "/".join([*folder.parts[-2 - above : -2], one.name])
    return "/".join(folder.parts[-1 - above :])


def _renamed(one: Series, name: str) -> Series:
    if len(one.runs) > 1:
        return Series(name, one.runs)
    return Series(name, [replace(run, name=name) for run in one.runs])


def _summary(parts: Sequence[_Part], series: Sequence[Series], found: Sequence[Found]) -> Section:
    """What can be said in sentences, and how sure it is."""
    general = [sentence for part in parts for sentence in part.said]
    runs = sum(len(one.runs) for one in series)
    if runs > 1:
        general.insert(0, f"{runs} runs: {in_words([_counted(one) for one in series])}.")
    methods = {run.method for one in series for run in one.runs}
    general += [f"{name}: {text}." for name, text in _METHODS.items() if name in methods]
    general += unfinished(series)
    blocks: list[Block] = []
    said = [result for result in found if result.verdicts]
    if not said:
        general.append(
            "Nothing among these folders compares models with an interval, so nothing is said "
            "about which one is better: hive-vision probe --compare and hive-vision evaluate "
            "--compare do. A loss is that of one run with one seed."
        )
    if any(run.recipe.get("miniature") for one in series for run in one.runs):
        general.append(
            "The images are drawn and the models are small (the recipe has a miniature section): "
            "whether it is the same on real images and with models of real size is not in here."
        )
    blocks.append(Points(general))
    for result in said:
        text = (
            f"{result.section.title}. In brackets stands the 95% interval, where the true "
            "difference probably lies: one is only called better where zero is not in it."
        )
        blocks.append(Paragraph(text))
        blocks.append(Points(result.verdicts))
    return Section("Summary", blocks)


def _counted(one: Series) -> str:
    return one.name if len(one.runs) == 1 else f"{one.name} ({len(one.runs)} seeds)"


def _unique(sections: Sequence[Section]) -> list[Section]:
    """Number sections of the same title, which links tell apart by it."""
    counts: dict[str, int] = {}
    chosen = []
    for section in sections:
        count = counts[section.title] = counts.get(section.title, 0) + 1
        chosen.append(section if count == 1 else replace(section, title=f"{section.title} {count}"))
    return chosen
