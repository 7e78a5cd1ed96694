"""A small recipe whose every stage sees the data twice, and an undisturbed run of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hive_vision.training.arguments import DataArguments, ModelArguments, PretrainArguments
from tests.conftest import (
    IMAGE_SIZE,
    make_tokenizer,
    text_config,
    vision_config,
    write_image_folder,
)
from tests.training.conftest import stage

STEPS, SAVE_EVERY, BATCH = 6, 2, 4
SAMPLES = 12  # 3 steps see them all: steps 4 to 6 are a second epoch


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Smaller still than those of other tests, with and without dropout."""
    root = tmp_path_factory.mktemp("small")
    folders = {}
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        vision, text = vision_config("siglip", layers=4), text_config("llama", layers=2)
        vision.attention_dropout = text.attention_dropout = dropout
        suffix = "-dropout" if dropout else ""
        for name, model in (
            ("vision", transformers.AutoModel.from_config(vision)),
            ("language", transformers.AutoModelForCausalLM.from_config(text)),
        ):
            folders[name + suffix] = root / (name + suffix)
            model.save_pretrained(root / (name + suffix))
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        transformers.SiglipImageProcessor(size=size).save_pretrained(folders[f"vision{suffix}"])
        make_tokenizer().save_pretrained(folders[f"language{suffix}"])
    return folders


@pytest.fixture(scope="session")
def small_recipe(
    small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., PretrainArguments]:
    """Make a recipe: three stages, a checkpoint every two steps, two epochs in each stage."""
    images = write_image_folder(tmp_path_factory.mktemp("few") / "images", SAMPLES + 3)

    def make(output: Path, models: str = "", **options: Any) -> PretrainArguments:
        model = ModelArguments(
            str(small_models[f"vision{models}"]),
            str(small_models[f"language{models}"]),
            layer_density=0.5,
        )
        data = DataArguments(**{"train": str(images), "holdout": 0.2, **options.pop("data", {})})
        stages = {
            f"stage{n}": stage(n, max_steps=STEPS, batch_size=BATCH, warmup=0.2) for n in (1, 2, 3)
        }
        defaults = {"micro_batch_size": 4, "log_every": 1, "save_every": SAVE_EVERY, **stages}
        options = {**defaults, **options}
        return PretrainArguments(output=str(output), model=model, data=data, **options)

    return make
