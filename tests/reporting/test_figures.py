"""Figures: every line, its spread, and files that can be opened."""

from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from hive_vision.evaluation.statistics import Accuracy
from hive_vision.reporting.figures import interpolation_figure, layer_figure, save_figure


def accuracy(mean: float) -> Accuracy:
    return Accuracy(mean, 0.01, 0.02, 3, 100)


LAYERS = {
    "texture": {
        "base": [accuracy(0.5), accuracy(0.6)],
        "hive": [accuracy(0.7), accuracy(0.8), accuracy(0.9)],
    },
    "digit": {"base": [accuracy(0.1)], "hive": [accuracy(0.2)]},
}


def test_a_panel_for_each_set_and_a_line_for_each_method() -> None:
    figure = layer_figure(LAYERS, "how")
    assert [axes.get_title() for axes in figure.axes] == ["texture", "digit"]
    base, hive = figure.axes[0].get_lines()
    assert list(hive.get_xdata()) == [1, 2, 3]
    assert list(base.get_ydata()) == pytest.approx([50, 60])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["base", "hive"]


def test_the_band_is_the_spread() -> None:
    axes = layer_figure(LAYERS, "how").axes[0]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    spread = 100 * (0.01**2 + 0.02**2) ** 0.5
    assert min(band) == pytest.approx(50 - spread)
    assert max(band) == pytest.approx(60 + spread)


def test_methods_keep_their_colours() -> None:
    both, alone = (
        layer_figure({"texture": methods}, "how").axes[0].get_lines()[-1]
        for methods in (LAYERS["texture"], {"hive": LAYERS["texture"]["hive"]})
    )
    assert to_hex(both.get_color()) == to_hex(alone.get_color())
    other = layer_figure(LAYERS, "how").axes[0].get_lines()[0]
    assert to_hex(other.get_color()) != to_hex(both.get_color())


def test_no_two_lines_look_the_same() -> None:
    names = ("siglip", "base", "run2", "cascaded", "hive", "sa")
    lines = (
        layer_figure({"x": {name: [accuracy(0.5)] for name in names}}, "how").axes[0].get_lines()
    )
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in lines}) == len(names)


def test_a_long_title_stays_inside(tmp_path: Path) -> None:
    figure = layer_figure({"texture": LAYERS["texture"]}, "a long title " * 12)
    save_figure(figure, tmp_path / "layers")  # which lays it out
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_interpolation() -> None:
    kinds = {"linear": [accuracy(0.5), accuracy(0.6)], "zero_shot": [accuracy(0.2), accuracy(0.1)]}
    figure = interpolation_figure([0.0, 1.0], {"texture": kinds}, "how")
    linear, zero_shot = figure.axes[0].get_lines()
    assert list(linear.get_xdata()) == [0, 1]
    assert list(zero_shot.get_ydata()) == pytest.approx([20, 10])


def test_files(tmp_path: Path) -> None:
    png, svg = save_figure(layer_figure(LAYERS, "how"), tmp_path / "deeper" / "layers")
    with Image.open(png) as image:
        assert image.width > 800
        assert len(set(image.convert("L").resize((40, 20)).getdata())) > 5, "nothing was drawn"
    assert svg.read_text(encoding="utf-8").lstrip().startswith("<?xml")
