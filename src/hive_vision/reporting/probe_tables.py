"""Accuracies with their spread, and the differences between methods, for terminal and Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from hive_vision.evaluation.probe import ProbeResult
from hive_vision.evaluation.statistics import all_differences, best
from hive_vision.reporting.tables import MISSING, Cell, Grid

Results = Mapping[str, Mapping[str, ProbeResult]]


def accuracy_grid(results: Results) -> Grid:
    """Put methods side by side, a row for each set (the paper's Table 1, turned).

    The best of a set is bold where the 95% interval of its difference from each other method leaves
    out zero.
    """
    rows = []
    for name in _sets(results):
        leader = best({method: by_set[name].correct for method, by_set in results.items()})
        rows.append(
            [Cell(name)]
            + [Cell(accuracy_text(r[name]), bold=method == leader) for method, r in results.items()]
        )
    return Grid(["accuracy, %", *results], rows)


def difference_grid(results: Results) -> Grid:
    """List what each method has more than each before it, in points, with the 95% interval."""
    rows = []
    for name in _sets(results):
        found = all_differences({method: r[name].correct for method, r in results.items()})
        for (first, second), d in found.items():
            interval = f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            rows.append(
                [
                    Cell(name),
                    Cell(f"{first} - {second}"),
                    Cell(f"{100 * d.mean:+.1f} {interval}", bold=d.is_certain),
                ]
            )
    return Grid(["points", "", "with 95% interval"], rows)


def accuracy_text(result: ProbeResult) -> str:
    """Write an accuracy in percent with its spread over seeds and over test images."""
    accuracy = result.accuracy
    image_error = f"({100 * accuracy.image_error:.1f})"
    if accuracy.deviation is None:
        return f"{100 * accuracy.mean:.1f} {image_error}"
    return f"{100 * accuracy.mean:.1f} ±{100 * accuracy.deviation:.1f} {image_error}"


def layer_grid(name: str, layers: Mapping[str, Sequence[ProbeResult]]) -> Grid:
    """Put methods side by side, a row for each layer; the best of a layer is bold as above."""
    depth = max(len(results) for results in layers.values())
    rows = []
    for layer in range(depth):
        there = {m: results[layer] for m, results in layers.items() if layer < len(results)}
        leader = best({method: result.correct for method, result in there.items()})
        rows.append(
            [Cell(str(layer + 1))]
            + [
                Cell(accuracy_text(there[m]), bold=m == leader) if m in there else Cell(MISSING)
                for m in layers
            ]
        )
    return Grid([f"{name}: layer", *layers], rows)


def probe_report(results: Results) -> tuple[str, list[Grid]]:
    """Give the tables of a comparison, and what has to be said about them."""
    grids = [accuracy_grid(results)]
    if len(results) > 1:
        grids.append(difference_grid(results))
    first = next(iter(next(iter(results.values())).values()))
    return f"{how_found(first)}. {_spread(first)}", grids


def layer_report(
    results: Mapping[str, Mapping[str, Sequence[ProbeResult]]],
) -> tuple[str, list[Grid]]:
    """Give a table for each classification set, and what has to be said about them."""
    grids = [layer_grid(name, layers) for name, layers in results.items()]
    first = next(iter(next(iter(results.values())).values()))[0]
    return f"{how_found(first, every_layer=True)}. {_spread(first)}", grids


def interpolation_report(
    alphas: Sequence[float], results: Mapping[str, Mapping[str, Sequence[ProbeResult]]]
) -> tuple[str, list[Grid]]:
    """Give a table for each classification set, a row for each alpha, and the words to them."""
    grids = []
    for name, kinds in results.items():
        rows = [
            [Cell(f"{alpha:g}")] + [Cell(accuracy_text(values[row])) for values in kinds.values()]
            for row, alpha in enumerate(alphas)
        ]
        grids.append(Grid([f"{name}: alpha", *kinds], rows))
    first = next(iter(next(iter(results.values())).values()))[0]
    return (
        f"alpha: 0 is the base, 1 the trained encoder. {how_found(first)}. {_spread(first)}",
        grids,
    )


def search_grid(search: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Show what was tried for each method before; what was chosen is bold."""
    candidates = list(next(iter(search.values()))["held_out_accuracy"])
    rows = [
        [Cell(method)]
        + [
            Cell(f"{100 * found['held_out_accuracy'][c]:.1f}", bold=c == found["chosen"])
            for c in candidates
        ]
        for method, found in search.items()
    ]
    return Grid(["search: held-out, %", *candidates], rows)


def to_markdown(note: str, grids: Sequence[Grid]) -> str:
    """Write a report's tables and what has to be said about them."""
    return "\n".join([*(grid.to_markdown() for grid in grids), note, ""])


def results_json(results: Results) -> dict[str, Any]:
    """Give results and differences with every setting, ready for JSON."""
    differences: dict[str, Any] = {}
    for name in _sets(results):
        found = all_differences({m: r[name].correct for m, r in results.items()})
        differences[name] = [
            {"first": first, "second": second, "mean": d.mean, "low": d.low, "high": d.high}
            for (first, second), d in found.items()
        ]
    return {
        "results": {
            method: {name: result.to_json() for name, result in by_set.items()}
            for method, by_set in results.items()
        },
        "differences": differences,
    }


def _sets(results: Results) -> list[str]:
    return list(next(iter(results.values())))


def how_found(result: ProbeResult, every_layer: bool = False) -> str:
    """Say in a line what probe a result is of."""
    settings = result.settings
    if settings["probe"] == "retrieval":
        return "Retrieval by the whole model: recall at 1, 5 and 10"
    if settings["probe"] == "zero_shot":
        return f"Zero-shot classification by the whole model, templates {settings['templates']}"
    layer, depth = settings["layer"], settings["depth"]
    where = "the last layer" if layer == depth else f"layer {layer} of {depth}"
    where = "each layer" if every_layer else where
    tokens = {"mean": "mean of the patch tokens", "cls": "class token", "head": "own pooling head"}
    what = "all tokens" if settings["probe"] == "attentive" else tokens[settings["pooling"]]
    if settings["probe"] == "knn":
        return f"{settings['neighbours']} nearest neighbours, {what} of {where}"
    return f"{settings['probe'].title()} probe, protocol {settings['protocol']}, {what} of {where}"


def _spread(result: ProbeResult) -> str:
    error = f"in brackets, the standard error over {result.accuracy.images:,} test images"
    if result.accuracy.deviation is None:
        return f"The spread: {error}."
    return (
        f"The spread: ± the standard deviation over {len(result.seeds)} seeds; {error}. Intervals "
        "of differences count both."
    )
