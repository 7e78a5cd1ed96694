import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hive_vision.training.arguments import (
    DataArguments,
    FinetuneArguments,
    FinetuneData,
    InstructionArguments,
    ModelArguments,
    PretrainArguments,
    StageArguments,
    VlmArguments,
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
            "precision": "float32",
        }
        model |= options.pop("model", {})
        data |= options.pop("data", {})
        return PretrainArguments(
            model=ModelArguments(**model), data=DataArguments(**data), **{**defaults, **options}
        )

    return make


CHAT = ("what colour", "a red square"), ("where", "left"), ("how many", "two blue stars")


def write_conversations(folder: Path, count: int = 24) -> Path:
    """LLaVA's json beside its images: with one image, with two, and text only."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(count):
        images = [f"{number}-{which}.png" for which in range(number % 3)]
        for which, name in enumerate(images):
            colour = (number * 9 % 256, which * 90, 200)
            Image.new("RGB", (20, 16), colour).save(folder / name)
        turns = []
        for question, answer in CHAT[: 1 + number % 2]:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = "<image>\n" * len(images) + turns[0]["value"]
        image = {} if not images else {"image": images[0] if len(images) == 1 else images}
        samples.append({"id": str(number), "conversations": turns, **image})
    (folder / "chat.json").write_text(json.dumps(samples))
    return folder / "chat.json"


VLM_RULES = (
    {"projectors": 1e-2, **FROZEN},
    {"projectors": "frozen", "language_model": 1e-2, "vision_model": "frozen"},
)


@pytest.fixture
def vlm_recipe(
    backbone_folders: dict[str, Path], tmp_path: Path
) -> Callable[..., FinetuneArguments]:
    """Make a fine-tuning recipe with two steps for each stage; keyword arguments change it."""
    chat = write_conversations(tmp_path / "chat")

    def make(vision: str = "siglip", language: str = "llama", **options: Any) -> FinetuneArguments:
        data = {"train": str(chat), "holdout": 0.2, "max_tokens": 100}
        data |= options.pop("data", {})
        stages = {
            f"stage{number}": StageArguments(
                **{"rules": dict(rules), "max_steps": 2, "batch_size": 4}
                | options.pop(f"stage{number}", {})
            )
            for number, rules in enumerate(VLM_RULES, start=1)
        }
        defaults: dict[str, Any] = {
            "output": str(tmp_path / "vlm"),
            "micro_batch_size": 4,
            "log_every": 1,
            "precision": "float32",
        }
        return FinetuneArguments(
            model=VlmArguments(
                vision=str(backbone_folders[vision]),
                language=str(backbone_folders[language]),
                chat_template="llava",
            ),
            data=FinetuneData(InstructionArguments(**data), InstructionArguments(**data)),
            **stages,
            **{**defaults, **options},
        )

    return make
