"""The parts of a report about results: probes, VLM benchmarks, maps, and what they allow to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hive_vision.evaluation.probe import ProbeResult
from hive_vision.evaluation.statistics import Accuracy
from hive_vision.evaluation.vlm_baselines import MAJORITY
from hive_vision.reporting.curves import to_png
from hive_vision.reporting.figures import interpolation_figure, layer_figure
from hive_vision.reporting.probe_tables import (
    accuracy_grid,
    difference_grid,
    interpolation_report,
    layer_report,
    probe_report,
    search_grid,
)
from hive_vision.reporting.report import (
    Block,
    Gallery,
    Paragraph,
    Picture,
    Points,
    Section,
    TitledTable,
    in_words,
)
from hive_vision.reporting.tables import MISSING, Cell, Grid, side_by_side
from hive_vision.reporting.verdicts import Findings, leader, read_findings, verdicts
from hive_vision.reporting.vlm_tables import difference_grid as vlm_difference_grid
from hive_vision.reporting.vlm_tables import methods_of

_PNG = b"\x89PNG\r\n\x1a\n"
_WHOLE_MODEL = ("zero_shot", "retrieval")  # need no head of their own


@dataclass(frozen=True)
class Found:
    """What a folder of results adds to a report.

    Attributes:
        section: Its tables and figures.
        verdicts: What they allow to say, in sentences.
    """

    section: Section
    verdicts: Sequence[str] = ()


def probe_section(content: Mapping[str, Any], title: str, training_seeds: int | None) -> Found:
    """Show what probes found (the paper's Table 1).

    Args:
        content: ``results.json`` of ``hive-vision probe`` or ``compare``, or a demo's part of it.
        title: Of the section.
        training_seeds: Runs of each method behind the numbers; ``None`` if nobody knows.
    """
    blocks: list[Block] = []
    said: list[str] = []
    if "results" in content:
        results = {
            method: {name: ProbeResult.from_json(result) for name, result in by_set.items()}
            for method, by_set in content["results"].items()
        }
        note, _ = probe_report(results)
        grid = accuracy_grid(results)
        first = next(iter(next(iter(results.values())).values()))
        if first.settings["probe"] not in _WHOLE_MODEL:
            text = (
                "A small classifier, the head, is trained on what the frozen encoder makes of "
                "images. How often it is right on test images says how much of a thing the encoder "
                "shows."
            )
            blocks.append(Paragraph(text))
        if len(results) > 1:
            note += _what_is_bold(grid)
        blocks.append(TitledTable("Accuracy", grid, note))
        if len(results) > 1:
            blocks.append(_differences(difference_grid(results)))
            said = verdicts(list(results), read_findings(content["differences"], scale=100.0))
            heads = len(next(iter(next(iter(results.values())).values())).seeds)
            said.append(_how_sure_of_probes(training_seeds, heads))
    blocks += _layer_blocks(content.get("layers", {}))
    blocks += _interpolation_blocks(content)
    if content.get("search"):
        note = (
            "Bold: what was chosen for each method before the comparison, by its accuracy on "
            "training images that were held out."
        )
        blocks.append(TitledTable("Search", search_grid(content["search"]), note))
    return Found(Section(title, blocks), said)


def vlm_section(content: Mapping[str, Any], title: str) -> Found:
    """Show the scores of VLM benchmarks (the paper's Table 2).

    Args:
        content: ``results.json`` of ``hive-vision evaluate``.
        title: Of the section.
    """
    results: Mapping[str, Sequence[Mapping[str, Any]]] = content["results"]
    methods = methods_of(results)
    findings = read_findings(content["differences"], scale=1.0)
    runs = max(len(results[method]) for method in methods)
    note = "Scores of lmms-eval; MME is the sum of perception and cognition."
    if runs > 1:
        note += f" Means over {runs} runs, ± their standard deviation."
    if len(methods) < len(results):
        note += (
            f" {MAJORITY}: the one answer to everything that scores best; blind: the same model "
            "with grey images. The score of a model that does not beat "
            "them does not show that it uses the images."
        )
    grid = _score_grid(results, methods, findings)
    if len(methods) > 1:
        note += _what_is_bold(grid)
    blocks: list[Block] = [TitledTable("Scores", grid, note)]
    said: list[str] = []
    if any(findings.values()):
        blocks.append(_differences(vlm_difference_grid(content["differences"])))
        said = [*verdicts(methods, findings), _how_sure_of_scores(runs)]
    return Found(Section(title, blocks), said)


def figures_section(content: Mapping[str, Any], folder: Path, title: str) -> Found:
    """Show a folder that brings figures, tables and sentences of its own, as maps do.

    Args:
        content: Its ``results.json``.
        folder: Where the figures lie.
        title: Of the section.

    Raises:
        ValueError: If a figure is not there, or is no PNG.
    """
    blocks: list[Block] = []
    if content.get("models"):
        blocks.append(Paragraph(f"Models: {in_words(list(content['models']))}."))
    if content.get("sentences"):
        blocks.append(Points(content["sentences"]))
    blocks += [Gallery([_picture(figure, folder)]) for figure in content.get("figures", [])]
    for table in content.get("tables", []):
        rows = [[Cell(cell["text"], cell.get("bold", False)) for cell in r] for r in table["rows"]]
        grid = Grid(table["headings"], rows)
        blocks.append(TitledTable(table["title"], grid, table.get("note", "")))
    return Found(Section(title, blocks))


def _picture(figure: Mapping[str, str], folder: Path) -> Picture:
    path = folder / figure["file"]
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(
            f"{folder / 'results.json'} names the figure {figure['file']!r}, which is not in the "
            "folder; run the command that wrote it again"
        )
    png = path.read_bytes()
    if not png.startswith(_PNG):
        raise ValueError(f"{path} is no PNG; run the command that wrote it again")
    note = figure.get("note", "")
    return Picture(figure["title"], f"{figure['title']}. {note}".strip(), png, note)


def _layer_blocks(content: Mapping[str, Any]) -> list[Block]:
    if not content:
        return []
    layers = {
        name: {label: [ProbeResult.from_json(r) for r in of] for label, of in by.items()}
        for name, by in content.items()
    }
    note, grids = layer_report(layers)
    pictures = []
    for name, by in layers.items():
        accuracies = {label: [r.accuracy for r in results] for label, results in by.items()}
        figure = layer_figure({name: accuracies}, note.partition(". ")[0])
        peaks = [_peak(label, results) for label, results in accuracies.items()]
        alt = f"Line chart of accuracy on {name} against the encoder layer: {in_words(peaks)}."
        pictures.append(Picture(f"Accuracy of each layer: {name}", alt, to_png(figure)))
    tables = [
        TitledTable(f"Accuracy of each layer: {n}", g, note)
        for n, g in zip(layers, grids, strict=True)
    ]
    return [Gallery(pictures), *tables]


def _peak(label: str, layers: Sequence[Accuracy]) -> str:
    best = max(layers, key=lambda accuracy: accuracy.mean)
    return f"{label} highest in layer {layers.index(best) + 1} with {best.mean:.1%}"


def _interpolation_blocks(content: Mapping[str, Any]) -> list[Block]:
    if "interpolation" not in content:
        return []
    alphas = content["alphas"]
    found = {
        name: {kind: [ProbeResult.from_json(r) for r in of] for kind, of in by.items()}
        for name, by in content["interpolation"].items()
    }
    note, grids = interpolation_report(alphas, found)
    blocks: list[Block] = []
    for (name, kinds), grid in zip(found.items(), grids, strict=True):
        accuracies = {kind: [r.accuracy for r in results] for kind, results in kinds.items()}
        figure = interpolation_figure(alphas, {name: accuracies}, note.partition(". ")[2])
        title = f"Between base and trained encoder: {name}"
        alt = (
            f"Line chart of accuracy on {name} against alpha from {alphas[0]:g} to {alphas[-1]:g}."
        )
        blocks += [Gallery([Picture(title, alt, to_png(figure))]), TitledTable(title, grid, note)]
    return blocks


def _how_sure_of_probes(training_seeds: int | None, heads: int) -> str:
    of_heads = f" and the {heads} seeds of the heads" if heads > 1 else ""
    if training_seeds is None:
        return (
            f"The intervals count the choice of test images{of_heads}. How these encoders were "
            "trained, and how much a second training would differ, is not in these results."
        )
    if training_seeds == 1:
        return (
            "One training run of each method, with one seed. The intervals count the choice of "
            f"test images{of_heads}, not how much a second run would differ: they tell these "
            "encoders apart, not the methods."
        )
    return (
        f"{training_seeds} training runs of each method, each with its own seed. The intervals "
        "count the choice of test images and of seeds."
    )


def _how_sure_of_scores(runs: int) -> str:
    if runs == 1:
        return (
            "One run of each model. The intervals count the choice of the tasks' samples, not how "
            "much a second training would differ: they tell these models apart, not the methods."
        )
    return f"{runs} runs of each model. The intervals count the choice of samples and of runs."


def _differences(grid: Grid) -> TitledTable:
    note = "First minus second in points, 95% interval in brackets; bold where it leaves out zero."
    return TitledTable("Differences", side_by_side(grid), note)


def _what_is_bold(grid: Grid) -> str:
    if any(cell.bold for row in grid.rows for cell in row):
        return " Bold: better than every other one, as far as 95% intervals tell."
    return " Nothing is bold: none is better than every other one, as far as 95% intervals tell."


def _score_grid(
    results: Mapping[str, Sequence[Mapping[str, Any]]], methods: Sequence[str], findings: Findings
) -> Grid:
    tasks = {
        task: result["highest"]
        for runs in results.values()
        for task, result in (runs[0].items() if runs else ())
    }
    rows = []
    for task, highest in tasks.items():
        best = leader(methods, findings.get(task, ()))
        cells = [Cell(f"{task} (of {highest:g})")]
        for name, runs in results.items():
            scores = [run[task]["score"] for run in runs if task in run]
            cells.append(Cell(_score(scores), bold=name == best))
        rows.append(cells)
    return Grid(["score", *results], rows)


def _score(scores: Sequence[float]) -> str:
    if not scores:
        return MISSING
    mean = f"{fmean(scores):.1f}"
    return mean if len(scores) == 1 else f"{mean} ±{stdev(scores):.1f}"
