"""A report of any folders that the commands leave, told apart by their files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hive_vision.reporting.model_card import to_model_card
from hive_vision.reporting.report import Paragraph, Report, TitledTable
from hive_vision.studies.report import make_report, write_report
from hive_vision.training.arguments import FinetuneArguments, PretrainArguments
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.finetune import finetune
from hive_vision.training.pretrain import pretrain
from tests.reporting.run_folders import (
    demo_folder,
    evaluate_folder,
    finetune_run,
    maps_folder,
    pretrain_run,
    probes,
    study_folder,
    write,
)


def titles(report: Report) -> list[str]:
    return [section.title for section in report.sections]


def summary(report: Report) -> str:
    return str(report.sections[0].blocks)


def columns(report: Report) -> list[str]:
    """What stands side by side in the table of costs."""
    (section,) = [section for section in report.sections if section.title == "Losses and cost"]
    (table,) = [
        b
        for b in section.blocks
        if isinstance(b, TitledTable) and b.title == "After the last stage"
    ]
    return [row[0].text for row in table.grid.rows]


DONE = ["Learning curves", "Losses and cost", "What moved and what stayed"]
ASKED = ["What was run", "Recipe"]
OF_RUNS = [*DONE, *ASKED]


def test_one_run(tmp_path: Path) -> None:
    report = make_report([pretrain_run(tmp_path / "hive")])
    assert titles(report) == ["Summary", *OF_RUNS]
    assert report.title == "Report: hive"
    assert report.model is not None
    assert (report.model.kind, report.model.vision, report.model.method) == (
        *("encoder", "some/vit", "hive"),
    )
    assert "nothing is said about which one is better" in summary(report)


def test_a_fine_tuning_run(tmp_path: Path) -> None:
    report = make_report([finetune_run(tmp_path / "vlm")])
    assert report.model is not None
    assert (report.model.kind, report.model.method) == ("vlm", None)


def test_an_unfinished_run_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    report = make_report([pretrain_run(tmp_path / "hive", finished=False)])
    assert "hive is not finished: stage2, step 10 of 20" in summary(report)
    assert titles(report) == ["Summary", *OF_RUNS]


def test_runs_side_by_side(tmp_path: Path) -> None:
    report = make_report([pretrain_run(tmp_path / "sa", "sa"), pretrain_run(tmp_path / "hive")])
    assert columns(report) == ["sa", "hive"]
    assert report.title == "Report: sa and hive"
    assert report.model is None
    assert "2 runs: sa and hive." in summary(report)


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    folders = [pretrain_run(tmp_path / place / "hive") for place in ("one", "two")]
    report = make_report([*folders, folders[0], pretrain_run(tmp_path / "sa", "sa")])
    assert columns(report) == ["one/hive", "two/hive", "sa"], "and nothing twice"


@pytest.mark.parametrize("with_maps", [False, True])
def test_a_demo_is_its_runs_and_its_probes(tmp_path: Path, with_maps: bool) -> None:
    report = make_report([demo_folder(tmp_path / "demo", with_maps)])
    results = ["Probes", "Maps"] if with_maps else ["Probes"]
    assert titles(report) == ["Summary", *results, *OF_RUNS]
    assert columns(report) == ["base", "sa", "hive"]
    text = summary(report)
    assert "hive is better than base" in text
    assert "digit: no difference can be told" in text
    assert "they tell these encoders apart, not the methods" in text
    assert "The images are drawn" in text
    assert "hive: the language model cross-attends to encoder layers of matching depth." in text
    assert "cascaded: " not in text, "there is none"
    assert "95% interval, where the true difference probably lies" in text


def test_an_unfinished_demo(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path / "demo")
    (folder / "results.json").unlink()
    report = make_report([folder])
    assert columns(report) == ["base", "hive", "sa"]
    assert "the command that makes them has not ended" in summary(report)


def test_a_folder_of_runs_is_no_demo(tmp_path: Path) -> None:
    study = study_folder(tmp_path / "study")
    pretrain_run(tmp_path / "mine" / "hive-large")
    for folder, message in (
        (study / "runs", r"only holds runs \(4\).* give the study's folder, '.*study'$"),
        (tmp_path / "mine", r"only holds runs \(1\).*: hive-vision report .*hive-large$"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make_report([folder])
        assert "\n" not in str(caught.value)


def test_a_folder_above_runs_of_one_s_own_is_no_study(tmp_path: Path) -> None:
    pretrain_run(tmp_path / "runs" / "miniature-hive")
    with pytest.raises(ValueError, match="is neither a run nor results"):
        make_report([tmp_path])
    with pytest.raises(ValueError, match=r"report .*miniature-hive$"):
        make_report([tmp_path / "runs"])


def test_losses_of_fine_tuning_stand_apart(tmp_path: Path) -> None:
    """They are over other data and other tokens."""
    report = make_report([pretrain_run(tmp_path / "hive"), finetune_run(tmp_path / "vlm")])
    kinds = ("pre-training", "fine-tuning")
    apart = [f"{title}: {kind}" for title in DONE for kind in kinds]
    assert titles(report) == ["Summary", *apart, *ASKED]
    for section in report.sections:
        own, _, kind = section.title.partition(": ")
        if own in DONE:
            text = str([b for b in section.blocks if not isinstance(b, Paragraph)])
            assert ("hive" in text, "vlm" in text) == (kind == kinds[0], kind == kinds[1])


def test_a_study_has_a_column_for_each_method(tmp_path: Path) -> None:
    report = make_report([study_folder(tmp_path / "study")])
    assert columns(report) == ["base", "hive"]
    assert "base (2 seeds) and hive (2 seeds)" in summary(report)
    assert "2 training runs of each method, each with its own seed" in summary(report)
    assert report.model is None


def test_an_unfinished_study(tmp_path: Path) -> None:
    report = make_report([study_folder(tmp_path / "study", finished=False)])
    assert columns(report) == ["base", "hive"]
    assert "study is not finished" in summary(report)
    assert "Probes" not in titles(report)


def test_results_without_runs(tmp_path: Path) -> None:
    write(tmp_path / "probe" / "results.json", probes(base=0.5, hive=0.9))
    folders = [
        tmp_path / "probe",
        evaluate_folder(tmp_path / "evaluate", base=(0.3,), hive=(0.8,)),
        maps_folder(tmp_path / "maps"),
    ]
    report = make_report(folders)
    assert titles(report) == ["Summary", "Probes", "VLM benchmarks", "Maps"]
    assert "How these encoders were trained" in summary(report)
    assert "gqa: hive is better than base" in summary(report)


def test_sections_of_the_same_title_are_numbered(tmp_path: Path) -> None:
    folders = [evaluate_folder(tmp_path / name, hive=(0.8,)) for name in "ab"]
    assert titles(make_report(folders)) == ["Summary", "VLM benchmarks", "VLM benchmarks 2"]


def test_what_is_no_run(tmp_path: Path) -> None:
    run = pretrain_run(tmp_path / "hive")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "results.json", {"something": "else"})
    write(tmp_path / "broken" / "results.json", {"methods": [{}], "probe": {}})
    for folder, message in (
        (tmp_path / "gone", "is no folder; give output folders of hive-vision pretrain"),
        (tmp_path / "empty", "is neither a run nor results; give output folders"),
        (tmp_path / "other", "is neither a run nor results; give output folders"),
        (run / "encoder", "did you mean '.*hive'?"),
        (tmp_path / "broken", "files of another form .*KeyError: 'method'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make_report([folder])
        assert "\n" not in str(caught.value)


def test_page_and_card_are_written_and_the_same_again(tmp_path: Path) -> None:
    demo, out = demo_folder(tmp_path / "demo", with_maps=True), tmp_path / "deeper" / "out"
    write_report([demo], out)
    assert sorted(path.name for path in out.iterdir()) == ["model_card.md", "report.html"]
    page, card = ((out / name).read_text() for name in ("report.html", "model_card.md"))
    assert page.count("<img") == 3  # two stages and a map
    for text in ("hive is better than base", "Gradient flow", "stage1: projectors"):
        assert text in page
        assert text in card
    write_report([demo], out)
    assert (out / "report.html").read_text() == page


def test_a_report_inside_a_run_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = pretrain_run(tmp_path / "hive")
    before = json.loads((run / "results.json").read_text())
    write_report([run], run)
    assert make_report([run]) == make_report([run])
    assert json.loads((run / "results.json").read_text()) == before


def test_runs_as_the_trainer_leaves_them(
    recipe: Callable[..., PretrainArguments],
    vlm_recipe: Callable[..., FinetuneArguments],
) -> None:
    stopped, tuned = recipe(), vlm_recipe()
    with pytest.raises(InterruptedRunError):
        pretrain(stopped, stop_after=("stage2", 1))
    finetune(tuned)
    report = make_report([Path(stopped.output), Path(tuned.output)])
    assert "is not finished: stage2, step 1 of " in summary(report)
    card = to_model_card(report)
    for text in (
        "conversations in stage2",
        "| stage1: projectors | ",
        "Figure in report.html: stage2",
    ):
        assert text in card
    (row,) = [line for line in card.splitlines() if line.startswith("| state |")]
    assert row.endswith("| finished |")
