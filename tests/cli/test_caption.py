from typing import Any

import pytest

from hive_vision.cli import main
from hive_vision.evaluation import generation
from tests.cli.helpers import failure


def test_each_image_has_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(model: str, images: list[str], count: int) -> list[str]:
        return [f"{model} {image} {count}" for image in images]

    monkeypatch.setattr(generation, "write_captions", write)
    main(["caption", "a.png", "model=runs/x"])
    assert capsys.readouterr().out == "runs/x a.png 60\n"
    main(["caption", "a.png", "b=c.png", "model=m", "max_new_tokens=3"])
    assert capsys.readouterr().out == "a.png: m a.png 3\nb=c.png: m b=c.png 3\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model=x"], "no image given"),
        (["a.png"], "model"),
        (["a.png", "model=x", "max_new_tokens=many"], "max_new_tokens"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in failure(capsys, "caption", *argv)


def test_help(capsys: Any) -> None:
    main(["caption", "--help"])
    assert "usage: hive-vision caption IMAGE" in capsys.readouterr().out
