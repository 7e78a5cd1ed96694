"""What the tests of commands share."""

import pytest

from hive_vision.cli import main


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
