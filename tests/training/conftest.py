from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hive_vision.training.arguments import (
    DataArguments,
    ModelArguments,
    PretrainArguments,
    StageArguments,
)

FROZEN = {"language_model": "frozen", "vision_model": "frozen"}
RULES = (
    {"projectors": 1e-2, "cross_attentions": 1e-2, **FROZEN},
    {
        "projectors": 1e-2,
        "cross_attentions": 1e-2,
        "language_model": 1e-2,
        "vision_model": "frozen",
    },
    {"projectors": 1e-2, "cross_attentions": 1e-2, "language_model": 1e-2, "vision_model": 1e-2},
)


def stage(number: int, **options: Any) -> StageArguments:
    defaults = {"rules": dict(RULES[number - 1]), "max_steps": 2, "batch_size": 4}
    return StageArguments(**{**defaults, **options})


@pytest.fixture
def recipe(
    backbone_folders: dict[str, Path], image_folder: Path, tmp_path: Path
) -> Callable[..., PretrainArguments]:
    """Make a recipe of three stages with two steps each; keyword arguments change it."""

    def make(vision: str = "siglip", language: str = "llama", **options: Any) -> PretrainArguments:
        model = {
            "vision": str(backbone_folders[vision]),
            "language": str(backbone_folders[language]),
        }
        data = {"train": str(image_folder), "holdout": 0.2}
        defaults: dict[str, Any] = {
            "output": str(tmp_path / "run"),
            "stage1": stage(1),
            "stage2": stage(2),
            "stage3": stage(3),
            "micro_batch_size": 4,
            "log_every": 1,
        }
        model |= options.pop("model", {})
        data |= options.pop("data", {})
        return PretrainArguments(
            model=ModelArguments(**model), data=DataArguments(**data), **{**defaults, **options}
        )

    return make
