"""Learning curves: every loss where it belongs, and words for those who see none."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hive_vision.reporting.curves import (
    Curve,
    early_gradient,
    gradient_figure,
    gradient_pictures,
    loss_figure,
    loss_pictures,
    read_curve,
    read_gradients,
    to_png,
)
from hive_vision.reporting.run_facts import Series, Stage, read_run
from tests.reporting.run_folders import log_lines, pretrain_run, record_gradients, stage_result

CURVE = Curve([10, 20], [2.0, 1.5], [(20, 1.6)], [(20, 1.9)])


def test_losses_of_a_stage() -> None:
    log = [*log_lines("stage1", 20), {"step": 15, "held_out_loss": 1.5}, {"step": 20, "epoch": 1}]
    curve = read_curve(Stage("stage1", 20, stage_result("stage1", loss=1.25), log))
    assert curve.steps == [10, 20]
    assert curve.losses == [line["loss"] for line in log[:2]]
    assert curve.held_out == [(15, 1.5), (20, 1.25)]
    assert curve.shuffled == [(20, 1.75)]
    unfinished = read_curve(Stage("stage1", 20, None, log))
    assert unfinished.held_out == [(15, 1.5)]
    assert unfinished.shuffled == []


def test_lines_and_marks() -> None:
    axes = loss_figure({"hive": [CURVE, CURVE]}, ["sa", "hive"]).axes[0]
    trained, held_out, shuffled = axes.get_lines()[:3]
    assert list(trained.get_ydata()) == [2.0, 1.5]
    assert list(held_out.get_xydata()[0]) == [20, 1.6]
    assert list(shuffled.get_xydata()[0]) == [20, 1.9]
    assert shuffled.get_markerfacecolor() == "white"
    assert len({to_hex(line.get_color()) for line in axes.get_lines()}) == 1
    assert axes.get_ylabel() == "loss, nats per token"
    many = loss_figure({"hive": [CURVE] * 5}, ["hive"]).axes[0].get_lines()[0]
    assert many.get_linewidth() < trained.get_linewidth()
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["hive", "held out", "its images shuffled"], "a series once, not each run"


def test_no_two_series_look_the_same() -> None:
    names = ["base", "sa", "cascaded", "hive", "sa_equal_flops", "one/hive"]
    axes = loss_figure({name: [CURVE] for name in names}, names).axes[0]
    lines = axes.get_lines()[::3]
    assert len({to_hex(line.get_color()) for line in lines}) == len(names)
    alone = loss_figure({"hive": [CURVE]}, ["sa_equal_flops", "hive"]).axes[0].get_lines()[0]
    assert to_hex(alone.get_color()) == to_hex(lines[3].get_color())


def test_the_axis_is_logarithmic_where_losses_fall_far() -> None:
    assert loss_figure({"hive": [CURVE]}, ["hive"]).axes[0].get_yscale() == "linear"
    far = Curve([1, 2], [10.0, 1.0], [], [])
    assert loss_figure({"hive": [far]}, ["hive"]).axes[0].get_yscale() == "log"


def test_a_picture_for_each_stage(tmp_path: Path) -> None:
    run = read_run(pretrain_run(tmp_path / "hive"), "hive")
    base = read_run(pretrain_run(tmp_path / "base", "base"), "base")
    pictures = list(loss_pictures([Series("base", [base]), Series("hive", [run])]))
    assert [picture.title for picture in pictures] == ["stage1", "stage2"]
    assert "hive from 0.949 to 0.671" in pictures[0].alt
    seeds = list(loss_pictures([Series("hive", [run, run, run])]))
    assert "hive from 0.949 to 0.671" in seeds[0].alt, "the mean over seeds"
    log = tmp_path / "hive" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"stage2"', '"stage9"'))
    (tmp_path / "hive" / "results.json").unlink()
    _, last = loss_pictures([Series("hive", [read_run(tmp_path / "hive", "hive")])])
    assert "of hive" in last.alt, "the losses of stage1 are not those of stage2"
    assert "base" not in pictures[0].alt
    assert pictures[0].png.startswith(b"\x89PNG")


def test_the_same_figure_has_the_same_bytes() -> None:
    first, second = (to_png(loss_figure({"hive": [CURVE]}, ["hive"])) for _ in range(2))
    assert first == second


def test_nothing_logged_nothing_drawn(tmp_path: Path) -> None:
    base = read_run(pretrain_run(tmp_path / "base", "base"), "base")
    assert list(loss_pictures([Series("base", [base])])) == []


class TestGradients:
    def test_relative_to_the_last_layer_that_has_one(self, tmp_path: Path) -> None:
        folder = record_gradients(pretrain_run(tmp_path / "hive"), [4.0, 1.0, 2.0, None], 10, 20)
        found = read_gradients([read_run(folder, "hive")])
        assert list(found) == ["stage2"], "in stage1 the encoder is frozen"
        steps, ratios = found["stage2"]
        assert list(steps) == [10, 20]
        np.testing.assert_allclose(ratios, [[2.0, 0.5, 1.0, np.nan]] * 2)
        assert early_gradient(found) == pytest.approx(2)

    def test_several_seeds_are_averaged_where_all_recorded(self, tmp_path: Path) -> None:
        folders = [pretrain_run(tmp_path / name) for name in "abc"]
        record_gradients(folders[0], [1.0, 1.0], 10, 20)
        record_gradients(folders[1], [4.0, 1.0], 10)
        steps, ratios = read_gradients([read_run(f, f.name) for f in folders])["stage2"]
        assert list(steps) == [10]
        np.testing.assert_allclose(ratios, [[2.0, 1.0]])

    def test_the_first_third_over_all_records(self) -> None:
        ratios = np.array([[1.0, 4.0, 9, 9, 9, 1], [4.0, 16.0, 9, 9, 9, 1]])
        gradients = {"a": (np.array([1, 2]), ratios), "b": (np.array([1]), ratios[:1] * np.nan)}
        assert early_gradient(gradients) == pytest.approx(4)
        assert np.isnan(early_gradient({}))

    def test_a_cell_is_a_layer_and_the_steps_up_to_its_record(self) -> None:
        ratios = np.array([[8.0, 4.0, 1.0], [2.0, np.nan, 1.0]])
        gradients = {"stage2": (np.array([5, 20]), ratios), "stage3": (np.array([10]), ratios[:1])}
        *panels, bar = gradient_figure(gradients, 0.5, 8.0).axes
        assert [panel.get_title() for panel in panels] == ["stage2", "stage3"]
        (mesh,) = panels[0].collections
        corners = mesh.get_coordinates()
        assert list(corners[0, :, 0]) == [0, 5, 20]
        assert list(corners[:, 0, 1]) == [0.5, 1.5, 2.5, 3.5], "the first layer at the bottom"
        values = np.ma.filled(mesh.get_array(), -1.0).reshape(3, 2)
        assert values.tolist() == [[8, 2], [4, -1], [1, 1]]
        assert mesh.get_clim() == (0.5, 8)
        assert panels[0].get_gridspec().get_width_ratios() == pytest.approx([2 / 3, 1 / 3])
        assert mesh.get_cmap().name == "viridis"
        assert panels[0].get_ylabel() == "encoder layer"
        assert panels[1].get_xlabel() == "step"
        assert bar.get_ylabel() == "gradient, times the last layer's"

    def test_a_figure_for_each_series_that_has_any(self, tmp_path: Path) -> None:
        hive = record_gradients(pretrain_run(tmp_path / "hive"), [6.0, 0.5, 2.0], 10, 20)
        runs = [hive, pretrain_run(tmp_path / "sa", "sa")]
        series = [Series(run.name, [read_run(run, run.name)]) for run in runs]
        (picture,) = gradient_pictures(series)
        assert picture.title == "Gradient at each encoder layer: hive"
        assert "the first third of the layers gets 3 times" in picture.alt
        assert list(gradient_pictures(series[1:])) == []
        own = read_gradients(series[0].runs)
        assert picture.png == to_png(gradient_figure(own, 0.25, 3.0)), "from least to most"

    def test_nothing_but_unknown_norms_is_no_error(self, tmp_path: Path) -> None:
        folder = record_gradients(pretrain_run(tmp_path / "hive"), [None, None], 10)
        series = [Series("hive", [read_run(folder, "hive")])]
        assert len(list(gradient_pictures(series))) == 1
