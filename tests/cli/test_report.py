from pathlib import Path

import pytest

from hive_vision.cli import main
from hive_vision.cli.report import parse
from tests.cli.helpers import failure
from tests.reporting.run_folders import pretrain_run


def test_help_says_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "--help"])
    text = capsys.readouterr().out
    for word in ("RUN", "output=FOLDER", "report.html", "model_card.md", "95% intervals"):
        assert word in text


def test_the_last_line_names_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain_run(tmp_path / "hive")
    main(["report", str(run)])
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert (run / "report.html").is_file()
    assert (run / "model_card.md").is_file()


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["a"]) == ([Path("a")], Path("a"))
    assert parse(["a", "b"]) == ([Path("a"), Path("b")], Path("runs/report"))
    assert parse(["a", "--output=c"]) == ([Path("a")], Path("c"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output=x").mkdir()
    assert parse(["output=x"]) == ([Path("output=x")], Path("output=x")), "a folder that exists"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["output=x"], "no folder given"),
        (["a", "output="], "output is empty"),
        (["a", "--outptu=x"], "unknown option '--outptu=x'"),
        (["a", "title=x"], "unknown option 'title=x'"),
        (["gone"], "'gone' is no folder; give output folders of hive-vision pretrain"),
        (["gone", "output={file}"], "is a file; give a folder"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    argv = [word.format(file=tmp_path / "file") for word in argv]
    assert message in failure(capsys, "report", *argv)
