import dataclasses
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest

from hive_vision.cli import main
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.recipes import recipe_names


def keys(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_pretrain_lists_every_key_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert [key for key in keys(PretrainArguments) if key not in text] == []
    for name in recipe_names():
        assert name in text
    for method in get_args(get_type_hints(PretrainArguments)["method"]):
        assert method in text
    assert "the paper's 0.25" in " ".join(text.split()), "keys are listed without what they mean"


def test_help_after_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "debug", "--help"])
    assert "usage: hive-vision pretrain" in capsys.readouterr().out
