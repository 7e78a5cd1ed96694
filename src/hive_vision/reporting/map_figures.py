"""Figures of what a model looks at: gradient maps, attention maps, gradient flow, CKA.

Shapes: L encoder layers, S attending layers, T shown tokens, R x C patches, n samples.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from hive_vision.analysis.findings import AttentionNumbers
from hive_vision.analysis.gradient_flow import GradientFlow
from hive_vision.analysis.intervals import Interval, mean_intervals
from hive_vision.analysis.maps import GradientMaps
from hive_vision.reporting.figures import colour_of, marker_of

Scale = Literal["own", "shared"]

MAP = "viridis"  # perceptually uniform, and readable in grey
_COLUMNS = 13
_CELL = 1.05  # inches


def gradient_figure(
    image: Image.Image, caption: str, maps: Mapping[str, GradientMaps], scale: Scale = "own"
) -> Figure:
    """Show the gradient at every encoder layer: the image, then first to last (Figures 2, 5-11).

    Args:
        image: As the encoder sees it.
        caption: Whose loss was differentiated.
        maps: Model -> its maps, one below the other.
        scale: ``own`` stretches every map from 0 to its largest value, which stands above it;
            ``shared`` does that for all maps of a model together.
    """
    depth = max(len(found.norms) for found in maps.values())
    columns = min(depth + 1, _COLUMNS)
    lines = -(-(depth + 1) // columns)
    height = _CELL * 1.25 * lines * len(maps) + 1.1
    figure = Figure(figsize=(_CELL * columns + 1.2, height), layout="constrained")
    parts = figure.subfigures(len(maps), 1, squeeze=False)[:, 0]
    for part, (name, found) in zip(parts, maps.items(), strict=True):
        axes = part.subplots(lines, columns, squeeze=False).ravel()
        for panel in axes:
            panel.set_axis_off()
        axes[0].imshow(image)
        axes[0].set_title("image", fontsize=7)
        largest = float(np.nanmax(found.norms))
        for layer, norms in enumerate(found.norms, start=1):
            top = largest if scale == "shared" else float(np.max(norms))
            _show_norms(axes[layer], norms, top, f"layer {layer}")
        bar = ScalarMappable(Normalize(0, largest if scale == "shared" else 1), MAP)
        label = "gradient norm" if scale == "shared" else "share of the map's largest"
        part.colorbar(bar, ax=list(axes), shrink=0.8, aspect=12).set_label(label, fontsize=7)
        part.suptitle(f"{name}: loss {found.loss:.3f}", fontsize=9, fontweight="bold")
    how = (
        "all maps of a model on one scale"
        if scale == "shared"
        else "each map on its own scale, from 0 to the value above it"
    )
    _title(
        figure, f"Norm of the loss's gradient at each layer's output, by patch; {how}. {caption!r}"
    )
    return figure


def _show_norms(panel: Axes, norms: NDArray[np.float64], top: float, title: str) -> None:
    if np.isnan(norms).all():
        panel.text(0.5, 0.5, "no gradient", ha="center", va="center", fontsize=6)
        panel.set_title(title, fontsize=7)
        return
    panel.imshow(norms, cmap=MAP, vmin=0, vmax=top or 1.0)
    panel.set_title(f"{title}\n{norms.max():.1e}", fontsize=6)


def attention_figure(
    image: Image.Image,
    tokens: Sequence[str],
    weights: NDArray[np.float64],
    rows: Sequence[str],
    elsewhere: NDArray[np.float64],
    title: str,
    scale: Scale = "own",
) -> Figure:
    """Show where tokens look: columns are tokens, rows are layers, low at the top (Figure 3).

    Args:
        image: As the encoder sees it.
        tokens: T texts.
        weights: (S, T, R, C).
        rows: S names.
        elsewhere: (S, T) attention that is not on patches; said below each map.
        title: Model, heads and caption.
        scale: ``own`` or ``shared`` by all maps.
    """
    size = (_CELL * (len(tokens) + 1) + 1.4, _CELL * 1.2 * len(rows) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(tokens) + 1, squeeze=False)
    largest = float(weights.max())
    width, height = image.size
    for line, row in enumerate(rows):
        axes[line, 0].imshow(image)
        axes[line, 0].set_ylabel(row, fontsize=7)
        for column, token in enumerate(tokens):
            panel, found = axes[line, column + 1], weights[line, column]
            top = largest if scale == "shared" else float(found.max())
            panel.imshow(image.convert("L"), cmap="gray")
            panel.imshow(
                found,
                cmap=MAP,
                vmin=0,
                vmax=top or 1.0,
                alpha=0.65,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
            panel.set_xlabel(f"elsewhere {100 * elsewhere[line, column]:.0f}%", fontsize=6)
            if line == 0:
                panel.set_title(token or "''", fontsize=8)
    for panel in axes.ravel():
        panel.set_xticks([])
        panel.set_yticks([])
    bar = ScalarMappable(Normalize(0, largest if scale == "shared" else 1), MAP)
    label = "attention" if scale == "shared" else "share of the map's largest"
    figure.colorbar(bar, ax=axes, shrink=0.7, aspect=18).set_label(label, fontsize=7)
    how = "all maps on one scale" if scale == "shared" else "each map on its own scale"
    _title(figure, f"{title}; {how}. Elsewhere: attention on class token, registers or text.")
    return figure


def flow_figure(
    flows: Mapping[str, GradientFlow], updates: Mapping[str, NDArray[np.float64]], title: str
) -> Figure:
    """Draw gradient flow layer by layer, a line for each model.

    Args:
        flows: Model -> its gradients' statistics.
        updates: Model -> (L,) relative weight update of each layer in all stages together.
        title: Data and models in a line.
    """
    figure = Figure(figsize=(13.5, 6.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    places = {name: place for place, name in enumerate({**flows, **updates})}
    drawn = {
        "gradient relative to the last layer": {m: f.relative for m, f in flows.items()},
        "spatial entropy of the map (1: even)": {m: f.entropy for m, f in flows.items()},
        "effective number of patches": {m: f.patches for m, f in flows.items()},
        "agreement of two samples (cosine)": {
            m: f.agreement for m, f in flows.items() if len(f.agreement)
        },
    }
    for panel, (label, values) in zip(panels, drawn.items(), strict=False):
        for name, found in values.items():
            intervals = mean_intervals(found)
            if label.startswith("gradient"):  # geometric means
                intervals = [Interval(*(10**x for x in (i.mean, i.low, i.high))) for i in intervals]
                panel.set_yscale("log")
            _band(panel, name, places[name], intervals)
        panel.set_ylabel(label)
    for name, found in updates.items():
        layers = range(1, len(found) + 1)
        colour, marker = colour_of(name, places[name]), marker_of(name, places[name])
        panels[4].plot(layers, 100 * found, color=colour, marker=marker, markersize=4, label=name)
    panels[4].set_ylabel("weight update, % of the weights' norm")
    panels[5].set_axis_off()
    for panel in panels[:5]:
        panel.set_xlabel("encoder layer")
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[5].legend(handles, labels, loc="center", frameon=False)
    _title(figure, f"{title}. Bands: 95% intervals over samples.")
    return figure


def spread_figure(numbers: Mapping[str, AttentionNumbers], title: str) -> Figure:
    """Draw attention in numbers by attending layer, a line for each model.

    Args:
        numbers: Model -> its attention; a panel more if some know where named objects are.
        title: Data and models in a line.
    """
    drawn = {
        "entropy of attention (1: even)": {m: n.entropy for m, n in numbers.items()},
        "distance from its centre, image sides": {m: n.distance for m, n in numbers.items()},
        "attention of its words on the object": {
            m: np.array([look.mass for look in n.pointing])
            for m, n in numbers.items()
            if n.pointing
        },
    }
    drawn = {label: values for label, values in drawn.items() if values}
    figure = Figure(figsize=(3.4 * len(drawn) + 0.4, 3.9), layout="constrained")
    axes = figure.subplots(1, len(drawn))
    for panel, (label, values) in zip(axes, drawn.items(), strict=True):
        for name, found in values.items():
            layers, place = numbers[name].layers, list(numbers).index(name)
            _band(panel, name, place, mean_intervals(found), layers)
        panel.set_ylabel(label)
        panel.set_xlabel("language-model layer")
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True, nbins=_COLUMNS)
    lines = axes[0].get_lines()
    areas = [look.area for n in numbers.values() for look in n.pointing]
    if areas:
        even = float(np.mean(areas))
        lines += [axes[2].axhline(even, color="black", linestyle=":", label="even attention")]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    _title(figure, f"{title}. Bands: 95% intervals over samples.")
    return figure


def cka_figure(matrices: Mapping[tuple[str, str], NDArray[np.float64]], title: str) -> Figure:
    """Draw how alike the layers of pairs of encoders are, a heat map for each pair.

    Args:
        matrices: (first, second) -> (L, L') linear CKA.
        title: Data in a line.
    """
    figure = Figure(figsize=(3.4 * len(matrices) + 1.0, 3.9), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for panel, ((first, second), values) in zip(axes, matrices.items(), strict=True):
        rows, columns = values.shape
        panel.imshow(
            values,
            cmap=MAP,
            vmin=0,
            vmax=1,
            origin="lower",
            extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
        )
        panel.set_xlabel(f"{second}: layer")
        panel.set_ylabel(f"{first}: layer")
        for axis in (panel.xaxis, panel.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(ScalarMappable(Normalize(0, 1), MAP), ax=list(axes), shrink=0.85).set_label(
        "linear CKA"
    )
    _title(figure, title)
    return figure


def _band(
    panel: Axes,
    name: str,
    place: int,
    intervals: Sequence[Interval],
    layers: Sequence[int] | None = None,
) -> None:
    """Draw a line with its intervals, at these layers or from the first one on."""
    layers = layers or range(1, len(intervals) + 1)
    colour, marker = colour_of(name, place), marker_of(name, place)
    panel.plot(
        layers, [i.mean for i in intervals], color=colour, marker=marker, markersize=4, label=name
    )
    low, high = [i.low for i in intervals], [i.high for i in intervals]
    panel.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)


def _title(figure: Figure, text: str) -> None:
    letters = round(13 * figure.get_figwidth())  # that fit into a line
    figure.suptitle(fill(text, letters), fontsize="small")
