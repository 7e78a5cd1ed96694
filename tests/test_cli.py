"""The command line: help that answers at once, and errors of one line."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from hive_vision.cli import main
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.recipes import recipe_names

COMMANDS = ("demo", "pretrain")


@pytest.fixture(autouse=True)
def _leave_no_traces() -> Iterator[None]:
    """``main`` sets environment variables and log levels for the rest of its process."""
    environment, level = dict(os.environ), logging.getLogger("hive_vision").level
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger("hive_vision").setLevel(level)


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command writes."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("hive-vision: ")
    assert "Traceback" not in line
    return line


def run(*argv: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "hive_vision"]), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def keys(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


class TestHelp:
    @pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--offline", "--help"]])
    def test_lists_the_commands(self, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
        main(argv)
        output = capsys.readouterr()
        assert output.err == ""
        for word in (*COMMANDS, "--help", "--offline", "--quiet", "--debug", "key=value"):
            assert word in output.out

    def test_imports_nothing_heavy(self) -> None:
        code = (
            "import json, sys; from hive_vision.cli import main; main(['--help'])\n"
            "sys.stderr.write(json.dumps(sorted(sys.modules)))"
        )
        completed = run(code=code)
        assert completed.returncode == 0
        assert "pretrain RECIPE" in completed.stdout
        loaded = {name.partition(".")[0] for name in json.loads(completed.stderr)}
        assert "hive_vision" in loaded
        assert not loaded & {
            "torch",
            "transformers",
            "datasets",
            "numpy",
            "sklearn",
            "rich",
            "yaml",
        }

    def test_pretrain_lists_every_key_and_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["pretrain", "--help"])
        text = capsys.readouterr().out
        assert [key for key in keys(PretrainArguments) if key not in text] == []
        for name in recipe_names():
            assert name in text
        for method in get_args(get_type_hints(PretrainArguments)["method"]):
            assert method in text
        assert "the paper's 0.25" in " ".join(text.split()), (
            "keys are listed without what they mean"
        )

    def test_help_after_a_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["pretrain", "debug", "--help"])
        assert "usage: hive-vision pretrain" in capsys.readouterr().out

    def test_demo_lists_its_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["demo", "--help"])
        text = capsys.readouterr().out
        for word in ("--output", "--recipe", "--no-cascaded", "base", "sa", "hive"):
            assert word in text


class TestMistakes:
    def test_unknown_command_names_the_nearest(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = failure(capsys, "pretrian", "debug")
        assert "unknown command 'pretrian'; did you mean 'pretrain'?" in line

    def test_unknown_command_names_them_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = failure(capsys, "xyz")
        for command in COMMANDS:
            assert command in line

    def test_unknown_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "'debug'" in failure(capsys, "pretrain", "debugg")

    def test_unknown_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "did you mean 'seed'" in failure(capsys, "pretrain", "debug", "sead=1")

    def test_wrong_type(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "seed" in failure(capsys, "pretrain", "debug", "seed=abc")

    def test_missing_data(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        output = tmp_path / "run"
        line = failure(
            *(capsys, "pretrain", "debug", "miniature=null"),
            *(f"output={output}", f"data.train={tmp_path / 'nowhere'}"),
        )
        assert "nowhere" in line
        assert not output.exists()

    def test_output_that_is_a_file(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "run").write_text("something")
        line = failure(capsys, "pretrain", "debug", "miniature=null", f"output={tmp_path / 'run'}")
        assert str(tmp_path / "run") in line

    @pytest.mark.parametrize("argv", [["--outptu", "x"], ["--output"], ["extra"]])
    def test_unknown_option_of_the_demo(
        self, capsys: pytest.CaptureFixture[str], argv: list[str]
    ) -> None:
        assert argv[0] in failure(capsys, "demo", *argv)

    def test_debug_raises(self) -> None:
        with pytest.raises(ValueError, match="unknown command"):
            main(["pretrian", "--debug"])


class TestProcess:
    def test_error(self) -> None:
        completed = run("pretrian")
        assert (completed.returncode, completed.stdout) == (1, "")
        assert completed.stderr.splitlines() == [
            "hive-vision: unknown command 'pretrian'; did you mean 'pretrain'?"
        ]

    def test_debug_shows_the_traceback(self) -> None:
        completed = run("--debug", "pretrian")
        assert completed.returncode == 1
        assert completed.stderr.startswith("Traceback")
        assert "did you mean 'pretrain'" in completed.stderr


class TestSwitches:
    def test_offline_reaches_the_hub_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        main(["pretrain", "--help", "--offline"])
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"

    @pytest.mark.parametrize(
        ("switches", "level"), [([], logging.INFO), (["--quiet"], logging.WARNING)]
    )
    def test_quiet(self, switches: list[str], level: int) -> None:
        main(["pretrain", "--help", *switches])
        assert logging.getLogger("hive_vision").level == level
