from pathlib import Path

import pytest

from hive_vision.cli.reports import check_output, show_report
from hive_vision.reporting.map_report import MapStyle, write_maps
from hive_vision.reporting.tables import Cell, Grid
from tests.cli.helpers import failure
from tests.reporting.planted import findings


def test_tables_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(["accuracy, %", "hive"], [[Cell("texture"), Cell("91.0", bold=True)]])
    show_report(("Linear probe.", [grid]), tmp_path)
    shown = capsys.readouterr().out
    assert shown.index("texture") < shown.index("Linear probe.") < shown.index("written to")
    text = (tmp_path / "table.md").read_text()
    assert "| texture | **91.0** |" in text
    assert text.endswith("Linear probe.\n")


def test_runs_and_other_results_are_not_written_over(tmp_path: Path) -> None:
    write_maps(findings(shown=[], cka={}), tmp_path / "maps", MapStyle())
    check_output(tmp_path / "maps", "maps")
    with pytest.raises(ValueError, match="holds a run or other results; give a folder of its own"):
        check_output(tmp_path / "maps")
    check_output(tmp_path / "new")
    (tmp_path / "results.json").write_text("{}")
    check_output(tmp_path)
    with pytest.raises(ValueError, match="holds a run or other results"):
        check_output(tmp_path, "maps")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        check_output(tmp_path / "results.json")


@pytest.mark.parametrize(
    "command", [["probe", "encoder", "data=set"], ["evaluate", "vlm"], ["profile", "debug"]]
)
def test_commands_do_not_write_into_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("method: hive")
    line = failure(capsys, *command, f"output={tmp_path}")
    assert "holds a run or other results" in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
