"""Learning curves: every loss where it belongs, and words for those who see none."""

from pathlib import Path

from matplotlib.colors import to_hex

from hive_vision.reporting.curves import Curve, loss_figure, loss_pictures, read_curve, to_png
from hive_vision.reporting.run_facts import Series, Stage, read_run
from tests.reporting.run_folders import log_lines, pretrain_run, stage_result

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
    assert "base" not in pictures[0].alt
    assert pictures[0].png.startswith(b"\x89PNG")


def test_the_same_figure_has_the_same_bytes() -> None:
    first, second = (to_png(loss_figure({"hive": [CURVE]}, ["hive"])) for _ in range(2))
    assert first == second


def test_nothing_logged_nothing_drawn(tmp_path: Path) -> None:
    base = read_run(pretrain_run(tmp_path / "base", "base"), "base")
    assert list(loss_pictures([Series("base", [base])])) == []
