"""Figures, as PNG and SVG."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hive_vision.evaluation.statistics import Accuracy

# Okabe and Ito's colours, told apart by everyone; methods keep theirs from figure to figure.
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#000000")
_METHODS = ("base", "sa", "cascaded", "hive")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def layer_figure(accuracies: Mapping[str, Mapping[str, Sequence[Accuracy]]], title: str) -> Figure:
    """Draw accuracy against encoder layer, a panel for each classification set.

    Args:
        accuracies: Set -> method -> accuracy of each layer, from the first on.
        title: Says in a line how they were found.
    """
    figure = Figure(figsize=(1.2 + 4.3 * len(accuracies), 3.8), layout="constrained")
    panels = figure.subplots(1, len(accuracies), squeeze=False)[0]
    for axes, (name, methods) in zip(panels, accuracies.items(), strict=True):
        places = _places(methods)
        for method, layers in methods.items():
            _line(axes, method, places[method], range(1, len(layers) + 1), layers)
        axes.set_title(name)
        axes.set_xlabel("encoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _finish(figure, panels, title)


def interpolation_figure(
    alphas: Sequence[float], accuracies: Mapping[str, Mapping[str, Sequence[Accuracy]]], title: str
) -> Figure:
    """Draw accuracy against the share of the trained encoder's weights, a panel for each set.

    Args:
        alphas: 0 is the base encoder, 1 the trained one.
        accuracies: Set -> kind of accuracy (probe, zero-shot) -> one for each alpha.
        title: Says in a line how they were found.
    """
    figure = Figure(figsize=(1.2 + 4.3 * len(accuracies), 3.8), layout="constrained")
    panels = figure.subplots(1, len(accuracies), squeeze=False)[0]
    for axes, (name, kinds) in zip(panels, accuracies.items(), strict=True):
        for number, (kind, values) in enumerate(kinds.items()):
            _line(axes, kind, 5 + number, alphas, values)
        axes.set_title(name)
        axes.set_xlabel("alpha: 0 base, 1 trained")
    return _finish(figure, panels, title)


def _finish(figure: Figure, panels: Sequence[Axes], title: str) -> Figure:
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False)
    band = "Bands: standard error over test images and deviation over seeds, together."
    letters = round(13 * figure.get_figwidth())  # that fit into a line
    figure.suptitle(fill(f"{title}. {band}", letters), fontsize="small")
    return figure


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG.

    Args:
        figure: The figure.
        path: Where, without an ending.

    Returns:
        The two files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def colour_of(label: str, place: int) -> str:
    """Give a line's colour: a method its own, anything else that of its place."""
    return _COLOURS[_place(label, place) % len(_COLOURS)]


def marker_of(label: str, place: int) -> str:
    """Give a line's marker, as ``colour_of``."""
    return _MARKERS[_place(label, place) % len(_MARKERS)]


def _place(label: str, place: int) -> int:
    return _METHODS.index(label) if label in _METHODS else len(_METHODS) + place


def _places(labels: Iterable[str]) -> dict[str, int]:
    """Give each line a colour and marker: methods their own, others those after them."""
    others = count(len(_METHODS))
    return {label: _METHODS.index(label) if label in _METHODS else next(others) for label in labels}


def _line(
    axes: Axes, label: str, place: int, positions: Sequence[float], values: Sequence[Accuracy]
) -> None:
    """Draw one line with its spread as a band."""
    colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
    mean = [100 * value.mean for value in values]
    spread = [100 * value.spread for value in values]
    axes.plot(positions, mean, color=colour, marker=marker, markersize=4, label=label)
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axes.fill_between(positions, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)
