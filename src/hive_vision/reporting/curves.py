"""Learning curves: losses as they were logged, and the gradient at every encoder layer.

Shapes: K records, L encoder layers.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from hive_vision.reporting.figures import colour_of, marker_of
from hive_vision.reporting.report import Picture, in_words
from hive_vision.reporting.run_facts import Run, Series, Stage
from hive_vision.training.arguments import Method

# From this ratio of largest to smallest loss on, a linear axis would show only the fall.
_WIDE = 4.0
_MANY = 3  # runs in a series, from which on their lines are thin
_LEAST_SPAN = 2.0  # times more and times less gradient, which the colours span at least
_RECORD = "encoder_gradients"  # what training calls it in metrics.jsonl
_MAP = "viridis"  # perceptually uniform, and readable in grey
_NARROWEST = 0.12  # share of a figure's width that the panel of a short stage has

# Stage -> steps (K,) and, for each, the gradient's norm at each layer over the last layer's (K, L).
Gradients: TypeAlias = dict[str, tuple[NDArray[np.int_], NDArray[np.float64]]]


@dataclass(frozen=True)
class Curve:
    """A run's losses in a stage.

    Attributes:
        steps: Steps at which the training loss was logged.
        losses: The training loss there.
        held_out: Steps and held-out losses, with the right images.
        shuffled: The same with the images of other captions.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    held_out: Sequence[tuple[int, float]]
    shuffled: Sequence[tuple[int, float]]

    @property
    def values(self) -> list[float]:
        """Every loss there is."""
        return [*self.losses, *(loss for _, loss in (*self.held_out, *self.shuffled))]


def read_curve(stage: Stage) -> Curve:
    """Take the losses out of a stage's log and result."""
    trained = [(int(line["step"]), float(line["loss"])) for line in stage.log if "loss" in line]
    held_out = [
        (int(line["step"]), float(line["held_out_loss"]))
        for line in stage.log
        if "held_out_loss" in line
    ]
    shuffled = []
    if stage.result is not None:
        last = int(stage.result["steps"])
        held_out.append((last, float(stage.result["held_out_loss"])))
        shuffled.append((last, float(stage.result["held_out_loss_shuffled_images"])))
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    return Curve(steps, losses, held_out, shuffled)


def loss_pictures(series: Sequence[Series]) -> Iterator[Picture]:
    """Draw the losses of each stage that any run began."""
    stages = dict.fromkeys(s.name for one in series for run in one.runs for s in run.stages)
    for stage in stages:
        curves = {
            one.name: [read_curve(s) for run in one.runs for s in run.stages if s.name == stage]
            for one in series
        }
        curves = {name: own for name, own in curves.items() if any(curve.values for curve in own)}
        if curves:
            png = to_png(loss_figure(curves, [one.name for one in series]))
            yield Picture(stage, _in_words(stage, curves), png)


def loss_figure(curves: dict[str, list[Curve]], names: Sequence[str]) -> Figure:
    """Draw the losses of one stage.

    Args:
        curves: Series -> those of its runs.
        names: All series of the report, so that each keeps its colour from figure to figure.
    """
    # Small in inches: its letters stay readable on a telephone.
    figure = Figure(figsize=(5.0, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    # Methods have their own colours; what is none gets one of those that are left.
    others = [name for name in names if name not in get_args(Method)]
    handles = []
    for name, own in curves.items():
        place = others.index(name) if name in others else 0
        colour, marker = colour_of(name, place), marker_of(name, place)
        width = 1.6 if len(own) < _MANY else 0.8
        for curve in own:
            axes.plot(curve.steps, curve.losses, color=colour, linewidth=width)
            for points, fill in ((curve.held_out, colour), (curve.shuffled, "white")):
                steps, losses = [step for step, _ in points], [loss for _, loss in points]
                (line,) = axes.plot(steps, losses, color=colour, linestyle=":", linewidth=0.8)
                line.set(marker=marker, markersize=5, markerfacecolor=fill)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=name))
    for text, fill in (("held out", "black"), ("its images shuffled", "white")):
        handle = Line2D([], [], color="black", marker="o", markersize=5, label=text)
        handle.set(markerfacecolor=fill, linestyle="none")
        handles.append(handle)
    every = [value for own in curves.values() for curve in own for value in curve.values]
    if min(every) > 0 and max(every) > _WIDE * min(every):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, frameon=False, fontsize="small")
    return figure


def read_gradients(runs: Sequence[Run]) -> Gradients:
    """Take what ``gradients_every`` recorded out of logs; stages with a frozen encoder have none.

    Args:
        runs: Of one method; of several the geometric mean, at the steps that all of them recorded.
    """
    found: Gradients = {}
    for stage in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        every = [
            {int(line["step"]): line[_RECORD] for line in own.log if _RECORD in line}
            for run in runs
            for own in run.stages
            if own.name == stage
        ]
        logs = [log for log in every if log]
        if steps := sorted(set.intersection(*map(set, logs))) if logs else []:
            ratios = [[_over_last(log[step]) for step in steps] for log in logs]
            found[stage] = np.array(steps), np.exp(np.log(ratios).mean(axis=0))
    return found


def _over_last(norms: Sequence[float | None]) -> NDArray[np.float64]:
    """Divide by the norm at the last layer that has one; NaN where there is none."""
    known = np.array([norm or np.nan for norm in norms], dtype=np.float64)
    reached = np.flatnonzero(~np.isnan(known))
    return known / known[reached[-1]] if len(reached) else known


def early_gradient(gradients: Gradients) -> float:
    """Average the first third of the layers over all records, geometrically; NaN without any."""
    logs = [np.log(ratios[:, : max(1, ratios.shape[1] // 3)]) for _, ratios in gradients.values()]
    values = np.concatenate([log.ravel() for log in logs]) if logs else np.array([])
    values = values[~np.isnan(values)]
    return float(np.exp(values.mean())) if len(values) else float("nan")


def gradient_pictures(series: Sequence[Series]) -> Iterator[Picture]:
    """Draw the gradients that were recorded, a figure for each series, all in the same colours."""
    recorded = {one.name: read_gradients(one.runs) for one in series}
    values = [ratios.ravel() for own in recorded.values() for _, ratios in own.values()]
    known = np.concatenate([np.array([1.0]), *values])
    low = min(float(np.nanmin(known)), 1 / _LEAST_SPAN)
    high = max(float(np.nanmax(known)), _LEAST_SPAN)
    for name, own in recorded.items():
        if own:
            png = to_png(gradient_figure(own, low, high))
            times = f"{early_gradient(own):.3g} times the gradient of the last"
            alt = (
                f"Heat map of the gradient at each encoder layer against the step in {name}, "
                f"{in_words(list(own))}: on average the first third of the layers gets {times}."
            )
            yield Picture(f"Gradient at each encoder layer: {name}", alt, png)


def gradient_figure(gradients: Gradients, low: float, high: float) -> Figure:
    """Draw layer against step, a panel for each stage in which the encoder trained.

    Args:
        gradients: Of a series.
        low: Where the colours begin.
        high: Where they end.
    """
    figure = Figure(figsize=(5.0, 3.6), layout="constrained")
    lengths = np.array([float(steps[-1]) for steps, _ in gradients.values()])
    shares = np.maximum(lengths / lengths.sum(), _NARROWEST)
    panels = figure.subplots(1, len(gradients), sharey=True, squeeze=False, width_ratios=shares)[0]
    for axes, (stage, (steps, ratios)) in zip(panels, gradients.items(), strict=True):
        layers = np.arange(ratios.shape[1] + 1) + 0.5
        mesh = axes.pcolormesh(
            np.array([0, *steps]), layers, ratios.T, cmap=_MAP, norm=LogNorm(low, high)
        )
        axes.set_title(stage, fontsize="small")
        axes.set_xlabel("step")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[0].set_ylabel("encoder layer")
    bar = figure.colorbar(mesh, ax=list(panels), ticks=LogLocator(subs=(1, 2, 5)), format="{x:g}")
    bar.minorticks_off()
    bar.set_label("gradient, times the last layer's")
    return figure


def to_png(figure: Figure) -> bytes:
    """Draw a figure as the bytes of a PNG file, the same ones for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


def _in_words(stage: str, curves: dict[str, list[Curve]]) -> str:
    texts = []
    for name, own in curves.items():
        first = [curve.losses[0] for curve in own if curve.losses]
        last = [curve.losses[-1] for curve in own if curve.losses]
        if first:
            mean_first, mean_last = sum(first) / len(first), sum(last) / len(last)
            texts.append(f"{name} from {mean_first:.3g} to {mean_last:.3g}")
    logged = f": {in_words(texts)}" if texts else " of " + in_words(list(curves))
    return f"Line chart of the training loss against the step in {stage}{logged}."
