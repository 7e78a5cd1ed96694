"""The held-out caption loss: the same number on any number of processes."""

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hive_vision.data.captions import CaptionDataset
from hive_vision.data.collators import IGNORE_INDEX, CaptionCollator, InstructionCollator
from hive_vision.data.instructions import InstructionDataset
from hive_vision.models.pixels import SplitProcessor

logger = logging.getLogger(__name__)

Images = Literal["matched", "shuffled", "none"]


class ShuffledImages(Dataset[Any]):
    """Every sample with the image of another one.

    Args:
        data: The right ones.
    """

    def __init__(self, data: CaptionDataset | InstructionDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        """Give sample ``index`` with the image half the data set away."""
        return self.data.with_images_of(index, (index + len(self) // 2) % len(self))


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    data: CaptionDataset | InstructionDataset,
    collator: CaptionCollator | InstructionCollator,
    pixels: SplitProcessor,
    accelerator: Accelerator,
    batch_size: int,
    images: Images = "matched",
) -> float:
    """Compute the mean loss per supervised held-out token.

    Args:
        model: The model, sharded or not.
        data: Held-out captions or conversations.
        collator: Makes the batches.
        pixels: What it prepares images with.
        accelerator: Precision, device and the other processes.
        batch_size: Captions at once on one process.
        images: ``matched``; ``shuffled`` gives each caption the image of the sample half
            the data set away; ``none`` leaves images out (the language model alone).

    Returns:
        Cross-entropy in nats per token.
    """
    was_training = model.training
    model.eval()
    unusable: set[int] = set()
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    source: Dataset[Any] = ShuffledImages(data) if images == "shuffled" else data
    own = _share(len(data), batch_size, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        source,
        batch_sampler=[rows or [0] for rows in own],
        collate_fn=collator,
        generator=torch.Generator(),  # else the loader draws from the one that dropout uses
    )
    for rows, batch in zip(own, loader, strict=True):
        if rows:
            unusable |= {bad.sample_id for bad in batch["bad_samples"]}
        else:  # this process has no captions left, but the others need it in sharded layers
            batch["labels"][:] = IGNORE_INDEX
        inputs = {name: batch[name] for name in batch if name not in ("bad_samples", "sample_ids")}
        if images == "none":
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        inputs = pixels.normalize(send_to_device(inputs, accelerator.device))
        with accelerator.autocast():
            loss = model(**inputs, num_items_in_batch=1, return_logits=False).loss
        totals[0] += loss
        totals[1] += (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
    model.train(was_training)
    if unusable and images != "shuffled":  # said once for each pass over the right pairs
        logger.warning("%d held-out samples cannot be used and were replaced", len(unusable))
    summed, tokens = accelerator.reduce(totals).tolist()
    return float(summed / tokens)


def _share(count: int, batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """Rows of each of this process's batches; as many batches on every process, some empty."""

    def batches() -> Iterator[list[int]]:
        for start in range(rank * batch_size, count, ranks * batch_size):
            yield list(range(start, min(start + batch_size, count)))

    own: list[Any] = list(batches())
    most = -(-count // (ranks * batch_size))
    return own + [[]] * (most - len(own))
