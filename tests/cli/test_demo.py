import pytest

from hive_vision.cli import main
from tests.cli.helpers import failure


def test_demo_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--help"])
    text = capsys.readouterr().out
    for word in ("--output", "--recipe", "--no-cascaded", "base", "sa", "hive"):
        assert word in text


@pytest.mark.parametrize("argv", [["--outptu", "x"], ["--output"], ["extra"]])
def test_unknown_option_of_the_demo(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert argv[0] in failure(capsys, "demo", *argv)
