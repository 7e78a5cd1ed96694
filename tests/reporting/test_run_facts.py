"""What is read from the folders of runs, finished and not."""

from pathlib import Path

import pytest

from hive_vision.reporting.run_facts import Series, is_run, read_facts, read_run
from tests.reporting.run_folders import FINGERPRINT, finetune_run, pretrain_run


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(pretrain_run(tmp_path / "hive"), "mine")
    assert (run.name, run.method, run.status, run.model) == ("mine", "hive", "finished", "encoder")
    assert run.is_finished
    assert not run.is_vlm
    assert [stage.name for stage in run.stages] == list(run.planned) == ["stage1", "stage2"]
    assert [line["step"] for line in run.stages[1].log] == [10, 20]
    assert run.data["stage1"]["fingerprint"] == FINGERPRINT
    assert run.environment["device"] == "NVIDIA X"


def test_a_fine_tuning_run(tmp_path: Path) -> None:
    run = read_run(finetune_run(tmp_path / "vlm"), "vlm")
    assert (run.is_vlm, run.method, run.model) == (True, "vlm", "model")
    assert run.data["stage2"]["conversations"] == 60


def test_data_are_in_the_order_of_the_stages_finished_or_not(tmp_path: Path) -> None:
    """Checkpoints of a later stage are found before the model of an earlier one."""
    done, late = finetune_run(tmp_path / "done"), finetune_run(tmp_path / "late")
    (late / "stage2" / "model").rename(late / "stage2" / "checkpoint-20")
    found, same = (read_run(folder, "vlm").data for folder in (late, done))
    assert list(found) == list(same) == ["stage1", "stage2"]


def test_a_run_says_how_far_it_came(tmp_path: Path) -> None:
    folder = pretrain_run(tmp_path / "hive", finished=False)
    run = read_run(folder, "hive")  # the torn last line of its log does not count
    assert run.status == "not finished: stage2, step 10 of 20"
    assert run.model is None
    assert run.stages[0].result is not None
    assert run.stages[1].result is None
    log = folder / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "stage1" in line))
    assert "stage1 of stage1, stage2 is done" in read_run(folder, "hive").status
    log.unlink()
    (folder / "stage1" / "result.json").unlink()
    assert read_run(folder, "hive").status == "not finished: no step logged yet"


def test_the_untouched_encoder_has_no_stages(tmp_path: Path) -> None:
    assert read_run(pretrain_run(tmp_path / "base", "base"), "base").stages == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", "results.json cannot be read"),
        ("results.json", "[]", "results.json is not a dictionary"),
        ("recipe.yaml", "a: [", "recipe.yaml cannot be read"),
        ("recipe.yaml", "- 1", "recipe.yaml is not a recipe"),
        ("metrics.jsonl", "{x\n{}\n", "metrics.jsonl has a line that is no JSON"),
    ],
)
def test_broken_files_are_named_in_a_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = pretrain_run(tmp_path / "hive")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_run(folder, "hive")
    assert "\n" not in str(caught.value)


def test_what_is_no_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    assert read_facts(tmp_path / "results.json") is None


def test_a_series_says_each_text_once(tmp_path: Path) -> None:
    runs = [read_run(pretrain_run(tmp_path / str(n), seed=n), str(n)) for n in range(3)]
    series = Series("hive", runs)
    assert series.distinct(lambda run: str(run.recipe["seed"])) == "0, 1, 2"
    assert series.distinct(lambda run: run.method) == "hive"
    assert series.distinct(lambda run: run.name * 60) == f"{'0' * 60}, … (3 in all)"
