"""The parts of a report about what runs did: their losses, what moved, what it cost."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from hive_vision.analysis.intervals import mean_interval
from hive_vision.reporting.curves import (
    early_gradient,
    gradient_pictures,
    loss_pictures,
    read_gradients,
)
from hive_vision.reporting.report import (
    Block,
    Gallery,
    Paragraph,
    Section,
    TitledTable,
)
from hive_vision.reporting.run_facts import Series
from hive_vision.reporting.tables import MISSING, Cell, Grid

_SHUFFLED = "held_out_loss_shuffled_images"


def curves_section(series: Sequence[Series]) -> Section | None:
    """Draw the learning curves; ``None`` where nothing was logged."""
    pictures, gradients = list(loss_pictures(series)), list(gradient_pictures(series))
    if not pictures and not gradients:
        return None
    text = (
        "Lines: the training loss as it was logged; lower is better. Filled marks: the held-out "
        "loss. Hollow marks: the held-out loss where each caption has another one's image; where "
        "the model reads its image, this one is higher."
    )
    if any(len(one.runs) > 1 for one in series):
        text += " A line for each run; the runs of a method have one colour."
    blocks: list[Block] = [Paragraph(text), Gallery(pictures)] if pictures else []
    if gradients:
        text = (
            "How much of the loss's gradient arrives at each encoder layer while the encoder "
            "trains, as times what arrives at the last one: brighter is more. A panel for each "
            "stage; where the encoder is frozen there is nothing to see. All figures have the same "
            "colours."
        )
        blocks += [Paragraph(text), Gallery(gradients)]
    table = _gradient_table(series)
    return Section("Learning curves", [*blocks, table] if table else blocks)


def _gradient_table(series: Sequence[Series]) -> TitledTable | None:
    """Say over several seeds how much gradient the first third of the layers gets."""
    rows = []
    for one in series:
        found = [early_gradient(read_gradients([run])) for run in one.runs]
        known = [value for value in found if not np.isnan(value)]
        if len(known) > 1:
            log = mean_interval(np.log(known))
            ends = f"{np.exp(log.low):.3g} to {np.exp(log.high):.3g}"
            runs = ", ".join(f"{value:.3g}" for value in known)
            rows.append([Cell(one.name), Cell(f"{np.exp(log.mean):.3g} ({ends})"), Cell(runs)])
    if not rows:
        return None
    note = (
        "Times the last layer's, while the encoder trained. Geometric mean over the seeds; in "
        "brackets its 95% interval, which counts how much one training differs from another."
    )
    grid = Grid(["", "mean over seeds", "each run"], rows)
    return TitledTable("Gradient in the first third of the layers", grid, note)


def proof_section(series: Sequence[Series]) -> Section | None:
    """Show which parts moved in each stage; ``None`` where no stage is finished."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one, stage in _finished_stages(series):
        for part, counts in stage["update_proof"].items():
            texts = cells.setdefault((stage["name"], part), {}).setdefault(one.name, [])
            if (text := _moved(counts)) not in texts:
                texts.append(text)
    if not cells:
        return None
    rows = [
        [Cell(f"{stage}: {part}"), *(Cell("; ".join(by.get(s.name, [MISSING]))) for s in series)]
        for (stage, part), by in sorted(cells.items(), key=lambda item: item[0][0])
    ]
    text = (
        "Before and after each stage every tensor is hashed. A part that trains has to move, a "
        "frozen one has to stay bit-identical; a run that fails this ends with an error. The table "
        "counts the tensors that moved and those that stayed."
    )
    grid = Grid(["stage: part", *(one.name for one in series)], rows)
    return Section("What moved and what stayed", [Paragraph(text), TitledTable("Tensors", grid)])


def loss_section(series: Sequence[Series]) -> Section | None:
    """Show held-out losses and what the runs cost; ``None`` where no run has any of it."""
    rows = [_cost_row(one) for one in series]
    blocks: list[Block] = []
    if any(cell.text != MISSING for row in rows for cell in row[1:]):
        headings = ["", "held-out loss", "with images shuffled", "trained parameters"]
        grid = Grid([*headings, "seconds per step", "peak memory"], rows)
        note = (
            "Held-out loss: nats per token after the last stage; lower is better. Seconds per "
            "step: of each stage. Both losses have no interval here, so no method is called better "
            "by them; times and memory are of the machine in “What was run”, with whatever else it "
            "did."
        )
        if any(run.method == "base" for one in series for run in one.runs):
            note += " The base has no connection to images: its loss is the language model's own."
        if any(len(one.runs) > 1 for one in series):
            note = f"Means over the runs, ± their standard deviation. {note}"
        blocks.append(TitledTable("After the last stage", grid, note))
    by_stage = _stage_losses(series)
    if by_stage is not None:
        note = "In brackets: with the images shuffled."
        blocks.append(TitledTable("Held-out loss after each stage", by_stage, note))
    guard = _guard_rows(series)
    if guard:
        grid = Grid(["stage and set", *(one.name for one in series)], guard)
        note = "Points of accuracy more than before any training, with their 95% interval."
        blocks.append(TitledTable("The encoder after each stage", grid, note))
    return Section("Losses and cost", blocks) if blocks else None


def unfinished(series: Sequence[Series]) -> list[str]:
    """Say which runs did not come to their end."""
    return [
        f"{run.name} is {run.status}. Only what was there is shown."
        for one in series
        for run in one.runs
        if not run.is_finished
    ]


def _finished_stages(series: Sequence[Series]) -> list[tuple[Series, Mapping[str, Any]]]:
    return [
        (one, stage.result)
        for one in series
        for run in one.runs
        for stage in run.stages
        if stage.result is not None
    ]


def _moved(counts: Mapping[str, int]) -> str:
    texts = [f"{counts['moved']} moved"] if counts["moved"] else []
    texts += [f"{counts['unchanged']} stayed"] if counts["unchanged"] else []
    return ", ".join(texts) or MISSING


def _cost_row(one: Series) -> list[Cell]:
    results = [run.results for run in one.runs if run.results is not None]
    last = [
        {**(result["stages"][-1] if result["stages"] else {}), **result}  # a VLM has it there only
        for result in results
    ]
    trained = [max((s["trained_parameters"] for s in r["stages"]), default=0) for r in results]
    memory = [r["peak_memory_bytes"] / 2**30 for r in results]
    finished = _finished_stages([one])
    stages = dict.fromkeys(stage["name"] for _, stage in finished)
    seconds = [
        _mean([s["seconds_per_step"] for _, s in finished if s["name"] == name], 2, False)
        for name in stages
    ]
    return [
        Cell(one.name),
        Cell(_mean([r["held_out_loss"] for r in last if "held_out_loss" in r], 3)),
        Cell(_mean([r[_SHUFFLED] for r in last if r.get(_SHUFFLED) is not None], 3)),
        Cell(", ".join(dict.fromkeys(f"{count:,}" for count in trained)) or MISSING),
        Cell(" / ".join(seconds) or MISSING),
        Cell(f"{_mean(memory, 2)} GiB" if memory else MISSING),
    ]


def _mean(values: Sequence[float], digits: int, has_spread: bool = True) -> str:
    if not values:
        return MISSING
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 or not has_spread else f"{mean} ±{stdev(values):.{digits}f}"


def _stage_losses(series: Sequence[Series]) -> Grid | None:
    stages = dict.fromkeys(stage["name"] for _, stage in _finished_stages(series))
    if not stages:
        return None
    rows = []
    for name in stages:
        cells = [Cell(name)]
        for one in series:
            own = [s for _, s in _finished_stages([one]) if s["name"] == name]
            matched = _mean([s["held_out_loss"] for s in own], 3)
            shuffled = _mean([s[_SHUFFLED] for s in own], 3)
            cells.append(Cell(f"{matched} ({shuffled})" if own else MISSING))
        rows.append(cells)
    return Grid(["stage", *(one.name for one in series)], rows)


def _guard_rows(series: Sequence[Series]) -> list[list[Cell]]:
    """What a recipe with ``probe_after_stage`` found."""
    texts: dict[str, dict[str, list[str]]] = {}
    for one, stage in _finished_stages(series):
        for name, found in stage.get("probe", {}).items():
            text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                *(100 * found[key] for key in ("difference", "low", "high"))
            )
            texts.setdefault(f"{stage['name']}: {name}", {}).setdefault(one.name, []).append(text)
    return [
        [Cell(row), *(Cell("; ".join(by.get(one.name, [MISSING]))) for one in series)]
        for row, by in texts.items()
    ]
