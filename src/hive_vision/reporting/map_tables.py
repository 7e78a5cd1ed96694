"""Gradient flow and attention as tables and plain sentences, each with its interval.

Shapes: n samples, L encoder layers, S attending layers.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hive_vision.analysis.findings import MapFindings
from hive_vision.analysis.intervals import Interval, mean_interval, mean_intervals
from hive_vision.reporting.tables import Cell, Grid

Titled = tuple[str, Grid, str]


def flow_grid(found: MapFindings) -> Titled | None:
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


def pointing_grid(found: MapFindings) -> Titled | None:
    """Tabulate how much of the attention of an object's words falls on the object."""
    pointed = {name: n.pointing for name, n in found.numbers.items() if n.pointing}
    if not pointed:
        return None
    rows = []
    for name, looks in pointed.items():
        columns = [
            [look.mass.mean() for look in looks],
            [look.area for look in looks],
            [look.others.mean() for look in looks],
            [(look.mass - look.others).mean() for look in looks],
            [look.hit.mean() for look in looks],
            [look.patches for look in looks],
        ]
        cells = [Cell(_percent(mean_interval(np.array(values)))) for values in columns]
        rows.append([Cell(name), *cells])
    headings = [
        *("model", "own words", "even attention", "words for other objects"),
        *("own - other", "most attended patch on it", "by chance"),
    ]
    images = len(next(iter(pointed.values())))
    note = (
        "Percent of the attention on patches that falls on an object: from the words that name it, "
        "as they are written and just before, and from those for the other objects of images that "
        f"have several. Mean of all attending layers and of {images} images, with 95% intervals."
    )
    return "Do words look at what they name?", Grid(headings, rows), note


def training_note(found: MapFindings) -> str:
    """Say how encoders were trained if not alike: weights move with rate and steps."""
    trainings = found.encoder_training
    if len(set(trainings.values())) < 2:
        return ""
    said = ", ".join(f"{name}: {training}" for name, training in trainings.items())
    return f". Weight updates are not of the same training ({said})"


def claims(found: MapFindings) -> list[str]:
    """Say which of the paper's claims the numbers bear out, and how sure that is."""
    said = [_early_gradient(found, first, second) for first, second in combinations(found.flows, 2)]
    for name, flow in found.flows.items():
        third = max(1, flow.entropy.shape[1] // 3)
        early, late = flow.entropy[:, :third], flow.entropy[:, -third:]
        change = mean_interval(np.nanmean(late, axis=1) - np.nanmean(early, axis=1))
        what = "gradient maps of the last third of the layers", "those of the first third"
        said.append(_compared(name, *what, change, "more even", "more concentrated", "entropy"))
    for name, numbers in found.numbers.items():
        if numbers.distance.shape[1] > 1:
            change = mean_interval(numbers.distance[:, -1] - numbers.distance[:, 0])
            what = "attention of the last attending layer", "that of the first"
            said.append(
                _compared(name, *what, change, "more dispersed", "more local", "image sides")
            )
    for name, numbers in found.numbers.items():
        if numbers.pointing:
            gains = np.array([(look.mass - look.others).mean() for look in numbers.pointing])
            what = "an object's own words", "those for other objects"
            how = "more attentive to it", "less attentive to it", "share of attention"
            said.append(_compared(name, *what, mean_interval(gains), *how))
    if said:
        said.append(
            "One trained model of each: the intervals count the choice of images, not that another "
            "training would end elsewhere."
        )
    return said


def _compared(
    name: str, what: str, other: str, change: Interval, above: str, below: str, unit: str
) -> str:
    """Say on which side of zero a change is, or that this cannot be told."""
    if not change.is_certain:
        return f"{name}: no difference can be told between {what} and {other} ({_signed(change)})."
    direction = above if change.mean > 0 else below
    verb = "is" if what.startswith("attention") else "are"
    return f"{name}: {what} {verb} {direction} than {other} ({_signed(change)}; {unit})."


def _early_gradient(found: MapFindings, first: str, second: str) -> str:
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


def _times(interval: Interval) -> str:
    return f"{10**interval.mean:.2f} [{10**interval.low:.2f}, {10**interval.high:.2f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f}, {_ends(interval)}"


def _ends(interval: Interval) -> str:
    return f"95% interval {interval.low:+.3f} to {interval.high:+.3f}"
