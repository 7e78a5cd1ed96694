"""The command line: help that answers at once, and errors of one line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hive_vision.cli import COMMANDS, main
from tests.cli.helpers import failure

BACKBONES = {"vision": "siglip", "language": "llama"}


def run(*argv: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "hive_vision"]), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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

    def test_missing_data(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        backbone_folders: dict[str, Path],
    ) -> None:
        output = tmp_path / "run"
        models = (f"model.{role}={backbone_folders[name]}" for role, name in BACKBONES.items())
        line = failure(
            *(capsys, "pretrain", "debug", "miniature=null"),
            *(f"output={output}", f"data.train={tmp_path / 'nowhere'}", *models),
        )
        assert "nowhere" in line
        assert not output.exists()

    def test_output_that_is_a_file(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "run").write_text("something")
        line = failure(capsys, "pretrain", "debug", "miniature=null", f"output={tmp_path / 'run'}")
        assert str(tmp_path / "run") in line

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
