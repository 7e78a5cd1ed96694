"""What both kinds of training share: the same folder layout, manifests, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from hive_vision.folders import read_manifest
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.finetune import finetune
from hive_vision.training.pretrain import pretrain


@pytest.fixture(params=["pretrain", "finetune"])
def kind(request: pytest.FixtureRequest, recipe: Any, vlm_recipe: Any) -> tuple[Any, Any]:
    """How to make a recipe, and how to run it."""
    return (recipe, pretrain) if request.param == "pretrain" else (vlm_recipe, finetune)


def test_every_folder_says_what_it_is(kind: tuple[Any, Any]) -> None:
    make, train = kind
    arguments = make(save_every=1)
    with pytest.raises(InterruptedRunError):
        train(arguments, ("stage2", 1))
    run = Path(arguments.output)
    for folder, what in (("stage1/model", "model"), ("stage2/checkpoint-1", "checkpoint")):
        manifest = read_manifest(run / folder, what)
        assert manifest["stage"] == folder.partition("/")[0]
        assert manifest["vision"] == arguments.model.vision
        assert manifest["data"]["fingerprint"]
    train(arguments)
    assert not list(run.glob("stage*/checkpoint-*"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert {line["stage"] for line in metrics} == set(arguments.stages)


def test_other_data_is_refused(vlm_recipe: Any, tmp_path: Path) -> None:
    """Of pre-training test_pretrain.py has it."""
    arguments = vlm_recipe(save_every=1)
    with pytest.raises(InterruptedRunError):
        finetune(arguments, ("stage1", 1))
    path = tmp_path / "chat" / "chat.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    with pytest.raises(ValueError, match="was trained on 19 conversations with fingerprint"):
        finetune(arguments)


def test_what_is_wrong_with_a_stage_names_it(kind: tuple[Any, Any]) -> None:
    make, train = kind
    arguments = make()
    arguments.stage1.epochs = 1.0
    with pytest.raises(ValueError, match="stage1: max_steps is 2 and epochs is 1"):
        train(arguments)
