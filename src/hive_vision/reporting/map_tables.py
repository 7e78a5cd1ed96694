"""Gradient flow and attention as tables and plain sentences, each with its interval.

Shapes: n samples, L encoder layers, S attending layers.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hive_vision.analysis.findings import Findings
from hive_vision.analysis.intervals import Interval, mean_interval, mean_intervals
from hive_vision.reporting.tables import Cell, Grid

Titled = tuple[str, Grid, str]


def flow_grid(found: Findings) -> Titled | None:
    """Tabulate each layer's gradient relative to the last layer's."""
    if not found.flows:
        return None
    columns = {name: mean_intervals(flow.relative) for name, flow in found.flows.items()}
    depth = max(len(intervals) for intervals in columns.values())
    rows = [
        [Cell(str(layer + 1))]
        + [
            Cell(_times(intervals[layer]) if layer < len(intervals) else "-")
            for intervals in columns.values()
        ]
        for layer in range(depth)
    ]
    note = (
        f"Times the norm at the last layer; geometric mean over {found.images} samples of "
        f"{found.data} with its 95% interval."
    )
    return "Gradient at each encoder layer", Grid(["layer", *columns], rows), note


def pointing_grid(found: Findings) -> Titled | None:
    """Tabulate how much of the attention of an object's words falls on the object."""
    pointed = {name: n.pointing for name, n in found.numbers.items() if n.pointing}
    if not pointed:
        return None
    rows = []
    for name, looks in pointed.items():
        best = int(np.array([look.mass for look in looks]).mean(axis=0).argmax())
        shares = [
            np.array([look.mass.mean() for look in looks]),
            np.array([look.mass[best] for look in looks]),
            np.array([look.area for look in looks]),
            np.array([look.hit[best] for look in looks]),
            np.array([look.patches for look in looks]),
        ]
        cells = [Cell(_percent(mean_interval(values))) for values in shares]
        rows.append([Cell(name), Cell(str(best + 1)), *cells])
    headings = [
        *("model", "best attending layer", "mass on the object, all layers", "in the best"),
        *("even attention", "most attended patch on it, in the best", "by chance"),
    ]
    images = len(next(iter(pointed.values())))
    note = (
        "Attention on patches of the words that name an object, as they are written and just "
        f"before; means over {images} images with 95% intervals. The best layer was chosen on the "
        "same images."
    )
    return "Do words look at what they name?", Grid(headings, rows), note


def claims(found: Findings) -> list[str]:
    """Say which of the paper's claims the numbers bear out, and how sure that is."""
    said = []
    for first, second in combinations(found.flows, 2):
        said.append(_early_gradient(found, first, second))
    for name, flow in found.flows.items():
        third = max(1, flow.entropy.shape[1] // 3)
        early, late = flow.entropy[:, :third], flow.entropy[:, -third:]
        change = mean_interval(np.nanmean(late, axis=1) - np.nanmean(early, axis=1))
        said.append(
            f"{name}: gradient maps of the last third of the layers are "
            f"{_direction(change, 'more even', 'more concentrated')} than those of the first third "
            f"(entropy {_signed(change)})."
        )
    for name, numbers in found.numbers.items():
        change = mean_interval(numbers.distance[:, -1] - numbers.distance[:, 0])
        said.append(
            f"{name}: attention of the last attending layer is "
            f"{_direction(change, 'more dispersed', 'more local')} than that of the first "
            f"(distance {_signed(change)} image sides)."
        )
    for name, numbers in found.numbers.items():
        if numbers.pointing:
            gain = mean_interval(
                np.array([look.mass.mean() - look.area for look in numbers.pointing])
            )
            said.append(
                f"{name}: words look at what they name "
                f"{_direction(gain, 'more', 'less', 'neither more nor less')} than even attention "
                f"would (by {100 * gain.mean:.1f} points of mass, {_ends(gain, 100)})."
            )
    return said


def _early_gradient(found: Findings, first: str, second: str) -> str:
    """Compare the gradient that reaches the first third of the layers, on the same samples."""

    def early(name: str) -> NDArray[np.float64]:
        relative = found.flows[name].relative
        return np.asarray(np.nanmean(relative[:, : max(1, relative.shape[1] // 3)], axis=1))

    change = mean_interval(early(first) - early(second))
    ends = f"{10**change.low:.2f} to {10**change.high:.2f}"
    return (
        f"Relative to the last layer, the first third of the layers gets "
        f"{10**change.mean:.2f} times ({ends}) the gradient in {first} that it gets in {second}"
        f"{'' if change.is_certain else ': no difference can be told'}."
    )


def _direction(
    change: Interval, above: str, below: str, neither: str = "neither more nor less so"
) -> str:
    if not change.is_certain:
        return neither
    return above if change.mean > 0 else below


def _times(interval: Interval) -> str:
    return f"{10**interval.mean:.2f} [{10**interval.low:.2f}, {10**interval.high:.2f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f}, {_ends(interval)}"


def _ends(interval: Interval, scale: float = 1.0) -> str:
    digits = 1 if scale > 1 else 3
    return f"95% interval {scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}"
