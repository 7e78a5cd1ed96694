"""Learning curves: the loss that was logged, and the held-out losses at the end of a stage."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hive_vision.reporting.figures import colour_of, marker_of
from hive_vision.reporting.report import Picture, in_words
from hive_vision.reporting.run_facts import Series, Stage
from hive_vision.training.arguments import Method

# From this ratio of largest to smallest loss on, a linear axis would show only the fall.
_WIDE = 4.0
_MANY = 3  # runs in a series, from which on their lines are thin


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
