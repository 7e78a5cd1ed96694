from pathlib import Path

import pytest

from hive_vision.cli.reports import show_report
from hive_vision.reporting.tables import Cell, Grid


def test_tables_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(["accuracy, %", "hive"], [[Cell("texture"), Cell("91.0", bold=True)]])
    show_report(("Linear probe.", [grid]), tmp_path)
    shown = capsys.readouterr().out
    assert shown.index("texture") < shown.index("Linear probe.") < shown.index("written to")
    text = (tmp_path / "table.md").read_text()
    assert "| texture | **91.0** |" in text
    assert text.endswith("Linear probe.\n")
