"""What a run's trainer is fed with, without the trainer and its model."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from hive_vision.data.collators import CaptionCollator, InstructionCollator
from hive_vision.data.sampler import LengthBucketedSampler
from hive_vision.data.sources import CaptionSource
from hive_vision.models.pixels import SplitProcessor
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import image_token_id
from hive_vision.naming import unknown_name
from hive_vision.studies.recipe_model import recipe_model
from hive_vision.training.arguments import FinetuneArguments, PretrainArguments, StageArguments
from hive_vision.training.finetune import vlm_inputs
from hive_vision.training.hardware import split_batch
from hive_vision.training.miniature import ensure_miniature, ensure_vlm_data
from hive_vision.training.run_data import (
    RunData,
    load_instruction_data,
    load_run_data,
    open_parts,
)


@dataclass(frozen=True)
class Feed:
    """The samples of a stage and what makes batches of them.

    Attributes:
        stage: Name of the stage.
        batch_size: Samples of a step.
        micro_batch_size: Samples at once, on one device.
        seed: Of the order.
        data: The samples.
        collator: Makes the batches.
        tokenizer: The language model's.
        name: What the source calls a sample.
    """

    stage: str
    batch_size: int
    micro_batch_size: int
    seed: int
    data: RunData[Any]
    collator: CaptionCollator | InstructionCollator
    tokenizer: Any
    name: Callable[[int], str]

    def micro_batches(self) -> Iterator[list[int]]:
        """Rows of one micro-batch after another, in the order of training; there is no end."""
        train = self.data.train
        sampler = LengthBucketedSampler(
            train.lengths,
            batch_size=self.batch_size,
            num_batches=sys.maxsize,
            seed=self.seed,
            parts=train.parts,
        )
        rows = iter(sampler)
        while True:
            yield list(islice(rows, self.micro_batch_size))

    def loader(self, rows: Iterator[list[int]], num_workers: int) -> DataLoader[Any]:
        """Make a loader as the trainer's is.

        Args:
            rows: Of each batch.
            num_workers: Processes that read images beside this one.
        """
        return DataLoader(
            self.data.train,
            batch_sampler=rows,
            collate_fn=self.collator,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the global one stays as it is
        )


def open_feed(arguments: PretrainArguments | FinetuneArguments, stage: str | None = None) -> Feed:
    """Open the data of a recipe as a run does.

    Args:
        arguments: The recipe.
        stage: Of which stage; the first with steps to do if not given.

    Raises:
        ValueError: If there is no such stage, or data, models and recipe do not fit together.
    """
    if stage is not None and stage not in arguments.stages:
        raise ValueError(unknown_name("stage", stage, arguments.stages))
    if isinstance(arguments, FinetuneArguments):
        return _conversations(arguments, stage)
    return _captions(arguments, stage)


def caption_processor(arguments: PretrainArguments, max_text_tokens: int) -> HiveProcessor:
    """Load what prepares images and captions for a recipe's models.

    Args:
        arguments: The recipe.
        max_text_tokens: Longer captions are cut.

    Raises:
        ValueError: If something is missing.
    """
    model = arguments.model
    return HiveProcessor.from_backbones(
        model.vision, model.language, max_text_tokens=max_text_tokens
    )


def _captions(arguments: PretrainArguments, stage: str | None) -> Feed:
    if arguments.miniature is not None:
        ensure_miniature(arguments.miniature)
    processor = caption_processor(arguments, arguments.data.max_text_tokens)
    data = load_run_data(arguments.data, processor)
    collator = CaptionCollator(
        SplitProcessor(processor.image_processor),
        processor.tokenizer.pad_token_id,
        _image_tokens(arguments, processor),
    )
    name = partial(_image_name, open_parts(arguments.data).train)
    chosen = stage or _first_stage(arguments.stages, data.samples)
    return _feed(arguments, chosen, data, collator, processor.tokenizer, name)


def _conversations(arguments: FinetuneArguments, stage: str | None) -> Feed:
    if arguments.miniature is not None:
        ensure_vlm_data(arguments.miniature)
    inputs = vlm_inputs(arguments.model)
    chosen = stage or _first_stage(arguments.stages, samples=1)
    data = load_instruction_data(getattr(arguments.data, chosen), inputs.form, inputs.image_tokens)
    processor = inputs.processor
    collator = InstructionCollator(
        SplitProcessor(processor.image_processor),
        processor.tokenizer.pad_token_id,
        inputs.form.image_token_id,
        inputs.image_tokens,
    )
    return _feed(arguments, chosen, data, collator, processor.tokenizer, data.train.name_of)


def _feed(arguments: PretrainArguments | FinetuneArguments, stage: str, *parts: Any) -> Feed:
    batch_size = arguments.stages[stage].batch_size
    micro, _ = split_batch(batch_size, arguments.micro_batch_size, 1)
    return Feed(stage, batch_size, micro, arguments.seed, *parts)


def _first_stage(stages: Mapping[str, StageArguments], samples: int) -> str:
    """The first stage that has steps to do."""
    return next((name for name in stages if stages[name].steps(samples) > 0), min(stages))


def _image_tokens(arguments: PretrainArguments, processor: HiveProcessor) -> tuple[int, ...]:
    """The placeholder tokens of method sa; no weights are loaded to count them."""
    if arguments.method != "sa":
        return ()
    *_, count = recipe_model(arguments)
    return (image_token_id(processor.tokenizer),) * count


def _image_name(sources: list[CaptionSource], number: int) -> str:
    """Name of a sample's image; samples are numbered through all sources."""
    for source in sources:
        if number < len(source.captions):
            return source.image_name(int(source.image_rows[number]))
        number -= len(source.captions)
    raise AssertionError(number)
