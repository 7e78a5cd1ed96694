"""Checkpoints and stage models: written aside, sealed, renamed; loaded strictly.

Both are folders with one manifest (see ``folders``): kind ``checkpoint`` holds everything that
is needed to go on, kind ``model`` is what a finished stage hands on.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hive_vision.folders import (
    BrokenFolderError,
    check_folder,
    check_keys,
    partial_folder,
    put_in_place,
    seal,
    written_aside,
)
from hive_vision.training.processes import on_main

logger = logging.getLogger(__name__)

KEPT = 2  # the newest, and one to fall back on


def checkpoint_folder(stage: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return stage / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints(stage: Path) -> list[Path]:
    """A stage's checkpoints, newest first."""
    return sorted(stage.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint's model has done."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(stage: Path) -> Path | None:
    """Find a stage's newest checkpoint whose every byte is as it was written.

    Broken ones are named in a warning and left out.
    """
    for checkpoint in checkpoints(stage):
        try:
            check_folder(checkpoint, "checkpoint")
        except BrokenFolderError as error:
            logger.warning("%s is broken (%s); using the one before it", checkpoint, error)
        else:
            return checkpoint
    return None


@contextmanager
def new_checkpoint(stage: Path, step: int, facts: dict[str, Any]) -> Iterator[Path]:
    """Give the folder in which the transformers trainer writes a checkpoint's own folder.

    After the block the checkpoint is sealed, takes its place, and older ones are deleted. When
    the block fails, the older ones stay.

    Args:
        stage: The stage's folder.
        step: Optimiser steps done.
        facts: For the manifest.

    Yields:
        A folder that will get a subfolder ``checkpoint-STEP``.
    """
    target = checkpoint_folder(stage, step)
    aside = partial_folder(target)
    on_main(lambda: _empty(aside))
    try:
        yield aside
        # Every process writes into it; sealed is what all of them have finished.
        PartialState().wait_for_everyone()
        on_main(lambda: _finish(aside / target.name, target, facts))
    finally:
        if PartialState().is_main_process:
            shutil.rmtree(aside, ignore_errors=True)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(written: Path, target: Path, facts: dict[str, Any]) -> None:
    seal(written, "checkpoint", step=step_of(target), **facts)
    put_in_place(written, target)
    for old in checkpoints(target.parent)[KEPT:]:
        shutil.rmtree(old)


def remove_checkpoints(stage: Path) -> None:
    """Delete a finished stage's checkpoints, and what an interrupted write left."""
    for folder in [*checkpoints(stage), *stage.glob(".*.partial")]:
        shutil.rmtree(folder)


def save_stage_model(
    model: PreTrainedModel,
    state_dict: dict[str, Tensor],
    processor: Any,
    folder: Path,
    facts: dict[str, Any],
) -> None:
    """Write the model that a finished stage hands on.

    Args:
        model: The model; its configuration is saved.
        state_dict: Its whole weights, also where the model itself holds only a shard of them.
        processor: Saved beside it.
        folder: Where to write; replaced as a whole.
        facts: For the manifest.
    """
    with written_aside(folder, replace=True) as aside:
        model.save_pretrained(aside, state_dict=state_dict)
        processor.save_pretrained(aside)
        seal(aside, "model", **facts)


def load_strictly(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Load a checkpoint's or a stage's model, every key and shape as the model wants it.

    transformers writes some families under older key names and loads leniently by itself: what
    does not fit would silently stay random.

    Raises:
        ValueError: Names expected and found keys.
    """
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for key, found, expected in report["mismatched_keys"]:
        raise ValueError(
            f"{folder} has {key!r} of shape {tuple(found)}; the model expects {tuple(expected)}"
        )
    check_keys(report["missing_keys"], report["unexpected_keys"], folder)
    return model
