import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hive_vision.cli import main
from hive_vision.training.arguments import FinetuneArguments
from hive_vision.training.recipes import FINETUNE, recipe_names
from tests.cli.helpers import failure
from tests.cli.test_pretrain import keys
from tests.training.conftest import VLM_RULES, write_conversations


def test_help_lists_every_key_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert [key for key in keys(FinetuneArguments) if key not in text] == []
    for name in recipe_names(FINETUNE):
        assert name in text


@pytest.fixture
def recipe_file(backbone_folders: dict[str, Path], tmp_path: Path) -> Path:
    data: dict[str, Any] = {"train": str(write_conversations(tmp_path / "chat")), "holdout": 0.2}
    stages = {
        f"stage{n}": {"rules": rules, "max_steps": 2, "batch_size": 4}
        for n, rules in enumerate(VLM_RULES, start=1)
    }
    recipe = {
        "output": str(tmp_path / "vlm"),
        "model": {
            "vision": str(backbone_folders["siglip"]),
            "language": str(backbone_folders["llama"]),
            "chat_template": "llava",
        },
        "data": {"stage1": data, "stage2": data},
        **stages,
    }
    path = tmp_path / "vlm.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_run_from_a_file(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quiet", "finetune", str(recipe_file), "stage2.max_steps=3"])
    out = capsys.readouterr().out
    assert f"model: {tmp_path / 'vlm' / 'model'}" in out
    assert "held-out loss: " in out
    results = json.loads((tmp_path / "vlm" / "results.json").read_text())
    assert [stage["steps"] for stage in results["stages"]] == [2, 3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vlm-papr"], "did you mean 'vlm-paper'"),
        (["vlm-paper", "stage3.max_steps=1"], "unknown recipe key 'stage3'; did you mean"),
        (["vlm-paper", "data.stage1.max_token=9"], "did you mean 'data.stage1.max_tokens'"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in failure(capsys, "finetune", *argv)
