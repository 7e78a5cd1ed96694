"""hive-vision plan: a table for people, numbers for programs, one line for mistakes."""

import json
from pathlib import Path

import pytest

from hive_vision.cli import main
from tests.cli.helpers import failure


@pytest.fixture
def tiny(backbone_folders: dict[str, Path]) -> list[str]:
    return [
        "debug",
        f"model.vision={backbone_folders['siglip']}",
        f"model.language={backbone_folders['llama']}",
        "miniature=null",
        "precision=auto",
    ]


def test_json_has_the_numbers(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    main(["plan", *tiny, "device=H100", "devices=2", "tokens=9", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"]["name"] == "H100"
    assert plan["precision"] == "bfloat16"
    assert plan["devices"] == 2
    assert plan["captions"]["tokens"] == 9
    assert [stage["name"] for stage in plan["stages"]] == ["stage1", "stage2", "stage3"]


def test_tables_for_people(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
    main(["plan", *tiny, "device=RTX 3090", "method=sa"])
    text = capsys.readouterr().out
    for word in ("sa:", "1 x RTX 3090", "stage3", "checkpointing", "GiB", "assumed", "71 TFLOP/s"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--help"])
    text = capsys.readouterr().out
    for word in ("device=", "devices=", "tokens=", "samples=", "--json", "paper-clip-l14-336"):
        assert word in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["devices=two"], "devices is 'two'"),
        (["device=H900"], "unknown device 'H900'; did you mean"),
        (["devicez=2"], "unknown recipe key 'devicez'"),
        (["method=base"], "method base trains nothing"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], tiny: list[str], given: list[str], words: str
) -> None:
    assert words in failure(capsys, "plan", *tiny, *given)
