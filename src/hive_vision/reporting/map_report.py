"""What was seen inside of models as files: figures, arrays, tables, and what they say.

Shapes: n samples, L encoder layers, S attending layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hive_vision.analysis.findings import ALL_STAGES, MapFindings, Shown
from hive_vision.analysis.maps import AttentionMaps, Heads
from hive_vision.folders import write_json
from hive_vision.reporting.figures import save_figure
from hive_vision.reporting.map_figures import (
    Scale,
    attention_figure,
    cka_figure,
    flow_figure,
    gradient_figure,
    spread_figure,
)
from hive_vision.reporting.map_tables import claims, flow_grid, pointing_grid, training_note

KIND = "maps"
_MOST_ROWS = 6
_MOST_TOKENS = 8


@dataclass(frozen=True)
class MapStyle:
    """How maps are drawn.

    Args:
        heads: mean or max of all heads, or the number of one.
        tokens: Words whose attention is shown; some of the caption's if empty.
        layers: Attending layers that are shown, by their numbers; at most six, evenly, if empty.
        scale: own stretches each map by itself, shared all of a figure alike.
    """

    heads: Heads = "mean"
    tokens: Sequence[str] = ()
    layers: Sequence[int] = ()
    scale: Scale = "own"


@dataclass
class _Folder:
    """What is written, in the order in which it is to be read."""

    path: Path
    figures: list[dict[str, str]] = field(default_factory=list)

    def save(self, figure: Any, name: str, title: str, note: str) -> None:
        png, _ = save_figure(figure, self.path / name)
        self.figures.append({"file": png.name, "title": title, "note": note})


def check_style(
    style: MapStyle, name: str, tokens: Sequence[str], attention: AttentionMaps
) -> None:
    """Refuse what cannot be drawn of a sample.

    Args:
        style: How maps are to be drawn.
        name: The model's.
        tokens: The caption's.
        attention: The model's.

    Raises:
        ValueError: If the style asks for heads, tokens or layers that are not there.
    """
    try:
        attention.combined(style.heads)
        _chosen_tokens(tokens, style.tokens)
        _chosen_layers(attention.layers, style.layers)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def write_maps(found: MapFindings, output: Path, style: MapStyle) -> dict[str, Any]:
    """Write figures (PNG, SVG), their arrays (npz) and ``results.json``.

    Args:
        found: What was seen.
        output: The folder.
        style: How maps are drawn.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: If the style asks for heads, tokens or layers that are not there.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder = _Folder(output)
    for shown in found.shown:  # before the first figure is written
        for name, maps in shown.attention.items():
            check_style(style, name, shown.tokens[name], maps)
    for number, shown in enumerate(found.shown):
        _draw_sample(folder, number, shown, style)
    _draw_numbers(folder, found)
    grids = [grid for grid in (flow_grid(found), pointing_grid(found)) if grid is not None]
    results = {
        "kind": KIND,
        "models": {name: {"folder": path} for name, path in found.models.items()},
        "data": found.data,
        "samples": found.images,
        "figures": folder.figures,
        "tables": [
            {
                "title": title,
                "headings": list(grid.headings),
                "rows": [[asdict(cell) for cell in row] for row in grid.rows],
                "note": note,
            }
            for title, grid, note in grids
        ],
        "sentences": claims(found),
        "weight_updates": {
            name: {stage: values.tolist() for stage, values in stages.items()}
            for name, stages in found.updates.items()
        },
    }
    write_json(output / "results.json", results)
    return results


def _draw_sample(folder: _Folder, number: int, shown: Shown, style: MapStyle) -> None:
    caption = shown.picture.caption
    arrays = {f"gradients_{name}": maps.norms for name, maps in shown.gradients.items()}
    folder.save(
        gradient_figure(shown.seen, caption, shown.gradients, style.scale),
        f"gradients-{number}",
        f"Gradient maps: {shown.picture.name}",
        f"Where the loss of {caption!r} reaches each encoder layer.",
    )
    for name, maps in shown.attention.items():
        tokens = _chosen_tokens(shown.tokens[name], style.tokens)
        rows = _chosen_layers(maps.layers, style.layers)
        weights = maps.combined(style.heads)
        elsewhere = (maps.prefix + maps.text).mean(axis=1)
        arrays |= {
            f"attention_{name}": maps.weights,
            f"attention_{name}_layers": np.array(maps.layers),
            f"tokens_{name}": np.array(shown.tokens[name]),
        }
        heads = style.heads if isinstance(style.heads, str) else f"head {style.heads}"
        folder.save(
            attention_figure(
                shown.seen,
                [shown.tokens[name][token] for token in tokens],
                weights[np.ix_(rows, tokens)],
                [f"layer {maps.layers[row]}\nencoder {maps.encoder_layers[row]}" for row in rows],
                elsewhere[np.ix_(rows, tokens)],
                f"{name}, heads: {heads}. {caption!r}",
                style.scale,
            ),
            f"attention-{number}-{name}",
            f"Attention maps of {name}: {shown.picture.name}",
            "Columns are tokens; rows are language-model layers, low at the top, and the encoder "
            "layer that they look at.",
        )
    _save_arrays(folder.path / f"maps-{number}.npz", arrays)


def _draw_numbers(folder: _Folder, found: MapFindings) -> None:
    over = f"{found.images} samples of {found.data}"
    if found.flows:
        updates = {name: stages[ALL_STAGES] for name, stages in found.updates.items()}
        caution = training_note(found)
        folder.save(
            flow_figure(found.flows, updates, f"Gradient flow by encoder layer, {over}{caution}"),
            "gradient_flow",
            "Gradient flow, layer by layer",
            "How much of the loss's gradient arrives at each layer, how it is spread over the "
            f"image, whether samples agree, and how far each layer's weights moved{caution}.",
        )
        quantities = ("norms", "entropy", "patches", "agreement")
        arrays: dict[str, NDArray[np.float64]] = {
            f"{quantity}_{name}": getattr(flow, quantity)
            for name, flow in found.flows.items()
            for quantity in quantities
        }
        _save_arrays(folder.path / "gradient_flow.npz", arrays)
    if found.numbers:
        folder.save(
            spread_figure(
                found.numbers, f"Attention of captions on patches, heads averaged, {over}"
            ),
            "attention_numbers",
            "Attention in numbers",
            "How spread out attention is, and how much of it falls on what a word names.",
        )
    if found.cka:
        folder.save(
            cka_figure(found.cka, f"Linear CKA of mean patch tokens, {over}"),
            "cka",
            "How alike the encoders' layers are",
            "1: the same up to rotation and scale; about 0: nothing in common. Debiased; "
            "without an interval.",
        )
        matrices = {f"{first}_{second}": values for (first, second), values in found.cka.items()}
        _save_arrays(folder.path / "cka.npz", matrices)


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


def _chosen_tokens(tokens: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Positions of the words asked for, or of some that are spread over the caption."""
    if not wanted:
        inside = range(1, len(tokens) - 1)
        words = [n for n in inside if len(tokens[n]) > 2] or list(inside) or [0]
        return _evenly(words, _MOST_TOKENS)
    for word in wanted:
        if word not in tokens:
            raise ValueError(f"tokens has {word!r}; the caption's tokens: {', '.join(tokens)}")
    return [tokens.index(word) for word in wanted]


def _chosen_layers(layers: Sequence[int], wanted: Sequence[int]) -> list[int]:
    if not wanted:
        return _evenly(list(range(len(layers))), _MOST_ROWS)
    for layer in wanted:
        if layer not in layers:
            raise ValueError(f"layers has {layer}; attention is in layers {list(layers)}")
    return [layers.index(layer) for layer in wanted]


def _evenly(places: Sequence[int], most: int) -> list[int]:
    if len(places) <= most:
        return list(places)
    return [places[round(step)] for step in np.linspace(0, len(places) - 1, most)]
