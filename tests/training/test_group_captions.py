"""Runs on images with several captions, each image encoded once for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hive_vision.models.backbones import backbones_of
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.pretrain import pretrain
from tests.conftest import IMAGE_SIZE, WORDS
from tests.data.helpers import images_with_captions, write_coco
from tests.training.conftest import stage
from tests.training.test_trainer import make_trainer

IMAGES, EACH = 16, 5
Recipe = Callable[..., PretrainArguments]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """16 images with five captions each; one of them cannot be read."""
    names, captions = images_with_captions(tmp_path, IMAGES, EACH, 5, WORDS, IMAGE_SIZE)
    return write_coco(tmp_path / "captions.json", names, captions)


@pytest.fixture
def grouped(recipe: Recipe, coco: Path, tmp_path: Path) -> Recipe:
    def make(name: str = "run", group: bool = True, **options: Any) -> PretrainArguments:
        data = {"train": str(coco), "holdout": 0.25, "max_bad_fraction": 0.2}
        data |= {"group_captions": group, **options.pop("data", {})}
        none = {"stage1": stage(1, max_steps=0), "stage2": stage(2, max_steps=0)}
        stages = {**none, "stage3": stage(3, max_steps=5, batch_size=10)}
        options = {**stages, "micro_batch_size": 5, **options}
        return recipe(data=data, output=str(tmp_path / name), **options)

    return make


def encoded_images(trainer: Any) -> list[int]:
    """Sizes of the batches that the encoder is given from now on."""
    sizes: list[int] = []
    vision, _ = backbones_of(trainer.model)
    vision.embeddings.patch_embedding.register_forward_hook(
        lambda module, args, output: sizes.append(len(args[0]))
    )
    return sizes


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_interrupted_and_continued_is_undisturbed(
    method: str, grouped: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRunError):
        pretrain(grouped("stopped", method=method), ("stage3", 2))
    stopped = pretrain(grouped("stopped", method=method))
    undisturbed = pretrain(grouped("undisturbed", method=method, data={"num_workers": 2}))
    one, other = (
        load_file(tmp_path / name / "stage3" / "model" / "model.safetensors")
        for name in ("stopped", "undisturbed")
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    for key in ("held_out_loss", "held_out_loss_shuffled_images", "bad_samples"):
        assert stopped[key] == undisturbed[key]
    assert undisturbed["bad_samples"] > 0
    lines = (tmp_path / "undisturbed" / "bad_samples.jsonl").read_text().splitlines()
    assert {Path(json.loads(line)["source"]).name for line in lines} == {"05.png"}


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_an_image_is_encoded_once_for_its_captions(method: str, grouped: Recipe) -> None:
    sizes = {}
    for group in (True, False):
        # A quarter is held out: an epoch of 60 captions is 6 steps.
        steps = stage(3, max_steps=12, batch_size=10)
        _, trainer = make_trainer(grouped(str(group), group, method=method, stage3=steps))
        sizes[group] = encoded_images(trainer)
        trainer.train()
    assert sum(sizes[False]) == 120
    # Twice twelve images; the bad one's captions have images of others.
    assert 24 <= sum(sizes[True]) <= 24 + 2 * EACH


@pytest.mark.parametrize("method", ["hive", "cascaded", "sa"])
def test_held_out_losses_do_not_depend_on_it(method: str, grouped: Recipe) -> None:
    losses, sizes = {}, {}
    for group in (True, False):
        # Groups of five do not fit into batches of four.
        _, trainer = make_trainer(
            grouped(str(group), group, method=method, micro_batch_size=4, stage3=stage(3))
        )
        for parameter in trainer.model.parameters():
            torch.manual_seed(parameter.numel())
            parameter.data += 0.05 * torch.randn(parameter.shape)
        sizes[group] = encoded_images(trainer)
        losses[group] = [trainer.held_out_loss(kind) for kind in ("matched", "shuffled")]
        losses[group].append(trainer.held_out_loss("none") if method != "sa" else 0.0)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][0] != pytest.approx(losses[True][1], rel=1e-4)
    assert sum(sizes[True]) < sum(sizes[False])


def test_a_run_cannot_go_on_in_the_other_order(grouped: Recipe) -> None:
    with pytest.raises(InterruptedRunError):
        pretrain(grouped(), ("stage3", 1))
    with pytest.raises(ValueError, match=r"another recipe .*group_captions"):
        pretrain(grouped(group=False))
