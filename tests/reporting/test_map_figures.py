"""Figures of maps: every panel, its scale and its name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from hive_vision.analysis.maps import GradientMaps
from hive_vision.reporting.figures import colour_of, marker_of
from hive_vision.reporting.map_figures import (
    Scale,
    attention_figure,
    cka_figure,
    flow_figure,
    gradient_figure,
    spread_figure,
)
from tests.reporting.planted import TOKENS, attention_maps, flow, gradient_maps, numbers

IMAGE = Image.new("RGB", (20, 16), "teal")


def titles(figure: Figure) -> list[str]:
    return [axes.get_title().partition("\n")[0] for axes in figure.axes if axes.get_title()]


def scales(figure: Figure, words: str) -> list[float]:
    return [a.images[-1].norm.vmax for a in figure.axes if a.get_title().startswith(words)]


@pytest.mark.parametrize(("layers", "panels"), [(6, 7), (12, 13), (24, 26)])
def test_a_panel_for_each_layer(layers: int, panels: int) -> None:
    maps = {"hive": gradient_maps(layers=layers), "sa": gradient_maps(1, layers)}
    figure = gradient_figure(IMAGE, "a dog", maps)
    figure.canvas.draw()
    expected = ["image", *(f"layer {layer}" for layer in range(1, layers + 1))]
    assert titles(figure) == expected * 2
    assert len(figure.axes) == 2 * (panels + 1)  # and a colour bar
    suptitles = [part.get_suptitle() for part in figure.subfigs]
    assert suptitles == ["hive: loss 2.500", "sa: loss 2.500"]
    assert "'a dog'" in figure.get_suptitle()
    shown = [axes for axes in figure.axes if axes.get_title().startswith(f"layer {layers}\n")]
    assert np.array_equal(shown[1].images[0].get_array(), maps["sa"].norms[-1])


@pytest.mark.parametrize("scale", ["own", "shared"])
def test_scale_of_gradients(scale: Scale) -> None:
    maps = {"hive": gradient_maps(), "sa": gradient_maps(1)}
    figure = gradient_figure(IMAGE, "a dog", maps, scale)
    by_map = np.array([found.norms.max(axis=(1, 2)) for found in maps.values()])
    wanted = by_map if scale == "own" else np.repeat(by_map.max(axis=1), 6)
    assert scales(figure, "layer") == pytest.approx(list(np.ravel(wanted)))


def test_a_layer_without_gradient_says_so() -> None:
    found = gradient_maps()
    norms = found.norms.copy()
    norms[-1] = np.nan
    for scale in ("own", "shared"):
        figure = gradient_figure(IMAGE, "", {"sa": GradientMaps(1.0, norms, norms[:, 0, 0])}, scale)
        (panel,) = [axes for axes in figure.axes if axes.get_title() == "layer 6"]
        assert [text.get_text() for text in panel.texts] == ["no gradient"]
        assert not panel.images
        assert sum(len(axes.texts) for axes in figure.axes) == 1


def attention(scale: Scale = "own") -> tuple[Figure, np.ndarray]:
    maps = attention_maps()
    weights = maps.combined()[:, 1:4] * np.array([1, 2])[:, None, None, None]
    elsewhere = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    words: Sequence[str] = TOKENS[1:4]
    return attention_figure(
        IMAGE, words, weights, ["low", "high"], elsewhere, "hive", scale
    ), weights


@pytest.mark.parametrize("scale", ["own", "shared"])
def test_attention_has_a_row_for_each_layer_and_a_column_for_each_token(scale: Scale) -> None:
    figure, weights = attention(scale)
    panels = figure.axes[:8]
    assert titles(figure) == ["a", "dog", "on"]
    assert [panel.get_ylabel() for panel in panels if panel.get_ylabel()] == ["low", "high"]
    drawn = [panel.images[-1] for panel in panels if len(panel.images) == 2]
    assert all(
        np.array_equal(image.get_array(), wanted)
        for image, wanted in zip(drawn, weights.reshape(6, 4, 5), strict=True)
    )
    assert {tuple(image.get_extent()) for image in drawn} == {(-0.5, 19.5, 15.5, -0.5)}
    tops = weights.max(axis=(2, 3)).ravel()
    wanted = tops if scale == "own" else np.full(6, weights.max())
    assert [image.norm.vmax for image in drawn] == pytest.approx(list(wanted))
    below = [panel.get_xlabel() for panel in panels if panel.get_xlabel()]
    assert below == [f"elsewhere {percent}%" for percent in (10, 20, 30, 40, 50, 60)]


def line(panel: Any, name: str) -> Any:
    (found,) = [found for found in panel.get_lines() if found.get_label() == name]
    return found


def test_flow_has_every_quantity_of_every_model() -> None:
    flows = {"run2": flow(2.0), "hive": flow(0.5), "run1": flow(1.0, seed=4)}
    updates = {"run1": np.linspace(0, 0.5, 6)}
    figure = flow_figure(flows, updates, "title")
    panels = figure.axes
    geometric = np.exp(np.log(flows["run2"].norms / flows["run2"].norms[:, -1:]).mean(axis=0))
    np.testing.assert_allclose(line(panels[0], "run2").get_ydata(), geometric)
    assert panels[0].get_yscale() == "log"
    for panel, quantity in zip(panels[1:4], ("entropy", "patches", "agreement"), strict=True):
        wanted = getattr(flows["hive"], quantity).mean(axis=0)
        np.testing.assert_allclose(line(panel, "hive").get_ydata(), wanted)
    assert list(line(panels[4], "run1").get_ydata()) == pytest.approx(list(100 * updates["run1"]))
    assert list(line(panels[4], "run1").get_xdata()) == [1, 2, 3, 4, 5, 6]
    legend = [text.get_text() for text in panels[5].get_legend().get_texts()]
    assert legend == list(flows)
    for name in flows:
        found = [line(p, name) for p in panels[:5] if name in p.get_legend_handles_labels()[1]]
        assert len({(to_hex(f.get_color()), f.get_marker()) for f in found}) == 1, name


def test_spread_by_language_model_layer() -> None:
    one, other = numbers(0.1, 0.4), numbers(0.0, 0.2, seed=3)
    blind = replace(one, pointing=[], layers=(1, 3))
    figure = spread_figure({"x": blind, "y": other}, "title")
    assert len(figure.axes) == 3
    assert {panel.get_xlabel() for panel in figure.axes} == {"language-model layer"}
    entropy, distance, pointed = figure.axes
    np.testing.assert_allclose(line(entropy, "x").get_ydata(), one.entropy.mean(axis=0))
    np.testing.assert_allclose(line(distance, "x").get_ydata(), one.distance.mean(axis=0))
    assert list(line(distance, "x").get_xdata()) == [1, 3]
    found = line(pointed, "y")
    assert list(found.get_xdata()) == [2, 4]
    mass = np.array([look.mass for look in other.pointing])
    np.testing.assert_allclose(found.get_ydata(), mass.mean(axis=0))
    assert to_hex(found.get_color()) == to_hex(line(entropy, "y").get_color())
    assert line(pointed, "even attention").get_ydata()[0] == pytest.approx(0.2)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["x", "y", "even attention"]
    figure.canvas.draw()
    below = legend.get_window_extent().y1
    assert all(panel.get_window_extent().y0 > below for panel in figure.axes)
    assert len(spread_figure({"x": blind}, "title").axes) == 2


def test_cka_has_a_panel_for_each_pair() -> None:
    figure = cka_figure({("base", "hive"): np.eye(6), ("hive", "sa"): np.eye(6, 4)}, "title")
    first, second, bar = figure.axes
    assert (first.get_ylabel(), first.get_xlabel()) == ("base: layer", "hive: layer")
    assert second.images[0].get_array().shape == (6, 4)
    assert tuple(second.images[0].get_extent()) == (0.5, 4.5, 0.5, 6.5)
    assert bar.get_ylabel() == "linear CKA"


def test_methods_keep_their_colour_and_others_get_that_of_their_place() -> None:
    assert len({colour_of("hive", place) for place in range(5)}) == 1
    methods = ("base", "sa", "cascaded", "hive")
    looks = {(colour_of(name, n), marker_of(name, n)) for n, name in enumerate(methods)}
    looks |= {(colour_of("run", place), marker_of("run", place)) for place in range(4)}
    assert len(looks) == 8
