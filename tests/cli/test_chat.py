from typing import Any

import pytest

from hive_vision.cli import main
from hive_vision.evaluation import generation
from tests.cli.helpers import failure


def test_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generation, "write_answer", lambda *given: " ".join(map(str, given)))
    main(["chat", "a.png", "is 1 = 2?", "model=m", "max_new_tokens=3"])
    assert capsys.readouterr().out == "m a.png is 1 = 2? 3\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.png", "model=x"], "give one IMAGE and one QUESTION in quotes; got 1"),
        (["a.png", "what", "is", "it", "model=x"], "got 4"),
        (["a.png", "what?"], "model"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in failure(capsys, "chat", *argv)


def test_help(capsys: Any) -> None:
    main(["chat", "--help"])
    assert "usage: hive-vision chat IMAGE" in capsys.readouterr().out
