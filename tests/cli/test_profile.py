"""hive-vision profile: tables for people, numbers and a figure in a folder."""

import json
from pathlib import Path

import pytest

from hive_vision.cli import main
from tests.cli.helpers import failure


@pytest.fixture
def tiny(backbone_folders: dict[str, Path], tmp_path: Path) -> list[str]:
    return [
        *("debug", "miniature=null", f"output={tmp_path / 'profile'}"),
        f"model.vision={backbone_folders['siglip']}",
        f"model.language={backbone_folders['llama']}",
        *("batch=2", "tokens=6", "methods=[sa, hive]", "stages=[stage1]"),
    ]


def test_folder_and_tables(
    capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path
) -> None:
    main(["profile", *tiny, "repetitions=1"])
    text = capsys.readouterr().out
    for words in ("stage1: GFLOP per caption", "of ceiling", "hive against sa", "eqs. 3, 5"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
    folder = tmp_path / "profile"
    assert {path.name for path in folder.iterdir()} == {
        *("results.json", "table.md", "scaling.png", "scaling.svg")
    }
    results = json.loads((folder / "results.json").read_text())
    assert results["stages"][0]["methods"]["hive"]["seconds"]


def test_counting_alone(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    main(["profile", *tiny, "repetitions=0", "scaling=false"])
    assert "of ceiling" not in capsys.readouterr().out


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    main(["profile", "--help"])
    assert "repetitions=N" in capsys.readouterr().out
    assert "batch is 0" in failure(capsys, "profile", *tiny, "batch=0")
    assert "methods" in failure(capsys, "profile", *tiny, "methods=[base]")
    assert "nonsense" in failure(capsys, "profile", *tiny, "nonsense=1")
