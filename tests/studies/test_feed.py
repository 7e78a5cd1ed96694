"""What feeds a trainer, without one: the same batches as the trainer's own loader."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hive_vision.models.pixels import SplitProcessor
from hive_vision.studies.feed import open_feed
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.pretrain import PretrainJob
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import apply_rules
from hive_vision.training.watchdog import Watchdog
from tests.studies.test_data_checks import recipe


@pytest.mark.parametrize("method", ["hive", "sa"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_trainers(
    method: str,
    num_workers: int,
    backbone_folders: dict[str, Path],
    image_folder: Path,
    tmp_path: Path,
) -> None:
    arguments = recipe(
        *(backbone_folders, image_folder, tmp_path / "run"),
        *(f"method={method}", "micro_batch_size=4", f"data.num_workers={num_workers}"),
    )
    run = RunFolder(arguments)
    run.create()
    interrupt = InterruptCallback(grace_seconds=60)
    job = PretrainJob(arguments, run, Watchdog(run.path, 0, 1, 0), interrupt)
    stage = job.stages["stage1"]
    expected = list(
        job.trainer("stage1", stage, apply_rules(job.model, stage.rules)).get_train_dataloader()
    )
    feed = open_feed(arguments)
    assert isinstance(feed.collator.image_processor, SplitProcessor)
    assert (feed.stage, feed.micro_batch_size) == ("stage1", 4)
    found = list(islice(feed.loader(feed.micro_batches(), num_workers), len(expected)))
    assert len(found) == len(expected) > 2
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        assert batch["pixel_values"].dtype == torch.uint8
        for name, value in batch.items():
            same = torch.equal if isinstance(value, torch.Tensor) else _equal
            assert same(value, other[name]), name


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def test_no_end(backbone_folders: dict[str, Path], image_folder: Path, tmp_path: Path) -> None:
    """Longer than all stages together: epoch after epoch."""
    feed = open_feed(recipe(backbone_folders, image_folder, tmp_path / "run"))
    batches = list(islice(feed.micro_batches(), 1000))
    assert {len(rows) for rows in batches} == {feed.micro_batch_size}
    assert {row for rows in batches for row in rows} == set(range(len(feed.data.train)))
