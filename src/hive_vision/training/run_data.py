"""The data of a run: from a recipe's ``data`` section to captions with token ids."""

import logging
from dataclasses import dataclass

from hive_vision.data.captions import CaptionDataset, load_captioned_images
from hive_vision.models.processing import HiveProcessor
from hive_vision.training.arguments import DataArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        train: Captions to learn from.
        held_out: Captions to judge by.
        fingerprint: Changes when the captions to learn from, or their images, change.
    """

    train: CaptionDataset
    held_out: CaptionDataset
    fingerprint: str


def load_run_data(data: DataArguments, processor: HiveProcessor) -> RunData:
    """Load training and held-out captions and tokenize them.

    Args:
        data: The recipe's ``data`` section.
        processor: Holds the tokenizer.

    Raises:
        ValueError: If nothing is found, or columns are missing.
    """
    train, held_out = load_captioned_images(
        data.train, data.image_column, data.caption_column, data.validation, data.holdout
    )
    held_out = held_out.select(range(min(len(held_out), data.max_held_out)))
    logger.info("%s: %d captions to learn from, %d held out", data.train, len(train), len(held_out))
    return RunData(
        CaptionDataset(train, processor.encode_captions),
        CaptionDataset(held_out, processor.encode_captions),
        fingerprint=train._fingerprint,
    )
