import json
from pathlib import Path
from typing import Any

import pytest

from hive_vision.cli import main
from hive_vision.cli.evaluate import parse
from hive_vision.studies import vlm
from tests.cli.helpers import failure
from tests.reporting.test_vlm_tables import result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    seen = []

    def evaluate(model: str, output: Path, settings: Any) -> Any:
        seen.append((model, output.name))
        return {task: result(task, 0.6 if "hive" in model else 0.5) for task in settings.tasks}

    monkeypatch.setattr(vlm, "evaluate_vlm", evaluate)
    return seen


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("--tasks", "--data", "--python", "--compare", "output="))


def test_one_model(calls: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "vlm"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").touch()
    main(["evaluate", str(run), "tasks=gqa", f"output={tmp_path / 'out'}"])
    assert calls == [(str(run / "model"), "vlm")]
    assert "gqa (of 100)" in capsys.readouterr().out
    assert "| gqa (of 100) | 50.0" in (tmp_path / "out" / "table.md").read_text()


def test_compare_with_several_runs_each(calls: Any, tmp_path: Path) -> None:
    command = ["evaluate", "--compare", "base=b0,b1", "hive=hive0,hive1", "tasks=gqa,mme"]
    main([*command, f"output={tmp_path / 'out'}"])
    assert [name for _, name in calls] == ["base-0", "base-1", "hive-0", "hive-1"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(content["results"]["hive"]) == 2
    (difference,) = content["differences"]["gqa"]
    assert (difference["first"], difference["second"]) == ("hive", "base")


def test_a_name_for_a_model_folder() -> None:
    models, output, settings = parse(["runs/x/model", "tasks=gqa", "limit=3"])
    assert models == {"x": ["runs/x/model"]}
    assert (output, settings.tasks, settings.limit) == (Path("runs/evaluate"), ("gqa",), 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tasks=gqa"], "give one MODEL, or --compare; got 0"),
        (["a", "b"], "got 2"),
        (["--compare", "a"], "write NAME=MODEL; got 'a'"),
        (["--compare", "a=x", "a=y"], "two models are called 'a'"),
        (["a", "--frobnicate"], "unknown option '--frobnicate'"),
        (["a", "tasks=scienceqa_full"], "have no image"),
        (["a", "limit=0"], "limit is 0"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in failure(capsys, "evaluate", *argv)
