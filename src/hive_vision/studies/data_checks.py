"""The data of a recipe before it is trained on: what cannot be used, and what a model is given."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hive_vision.data.collators import CaptionCollator, InstructionCollator
from hive_vision.data.quarantine import write_quarantine
from hive_vision.data.sampler import LengthBucketedSampler
from hive_vision.data.sources import CaptionSource
from hive_vision.data.verification import Inspection, caption_lengths, inspect_source, summarise
from hive_vision.folders import write_json
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import image_token_id
from hive_vision.naming import unknown_name
from hive_vision.studies.plan import build_on_meta
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

logger = logging.getLogger(__name__)

NOT_CUT = 2**20  # tokens; no caption is as long
LEARNED, READ, PADDING = "learned", "read", "padding"


def verify_data(arguments: PretrainArguments, quarantine: Path, workers: int) -> dict[str, Any]:
    """Decode all images of a recipe and measure its captions.

    Args:
        arguments: The recipe.
        quarantine: File to write; the summary is written beside it as ``.json``.
        workers: Processes.

    Returns:
        The summary, with ``problems``, the lines of the quarantine file.

    Raises:
        ValueError: If the data cannot be found at all.
    """
    if arguments.miniature is not None:
        ensure_miniature(arguments.miniature)
    parts = open_parts(arguments.data)
    processor = _processor(arguments, NOT_CUT)
    summary: dict[str, Any] = {"fingerprint": parts.fingerprint, "quarantine": str(quarantine)}
    found: dict[str, Inspection] = {}
    for purpose, sources in (("train", parts.train), ("held_out", parts.held_out)):
        inspections, lengths = [], [np.empty(0, dtype=np.int64)]
        for source in sources:
            title = f"{source.name} ({purpose.replace('_', '-')})"
            lengths.append(caption_lengths(source, processor.encode_captions, title))
            inspections.append(inspect_source(source, workers, title))
        found[purpose] = Inspection.join(inspections)
        summary[purpose] = summarise(
            found[purpose], np.concatenate(lengths), arguments.data.max_text_tokens
        )
    shared = np.isin(found["held_out"].image_hashes, found["train"].image_hashes)
    summary["held_out_images_in_train"] = int(shared.sum())
    problems = [problem for part in found.values() for problem in part.problems]
    captions = sum(part.captions for part in found.values())
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    write_quarantine(quarantine, parts.fingerprint, captions, problems)
    write_json(quarantine.with_suffix(".json"), summary)
    return {**summary, "problems": problems}


@dataclass(frozen=True)
class ShownSample:
    """A sample as a model is given it.

    Attributes:
        number: Of the sample, as in bad_samples.jsonl.
        source: What its source calls the image, or the conversation.
        sizes: Width and height of its images before the encoder's processor.
        tokens: Text of each token and what it is there for: learned, read or padding.
        replaces: Bad samples that it stands for, with the reason.
    """

    number: int
    source: str
    sizes: list[tuple[int, int]]
    tokens: list[tuple[str, str]]
    replaces: list[str]


@dataclass(frozen=True)
class ShownBatch:
    """A micro-batch, or the first samples of it.

    Attributes:
        pixel_values: Shape of the images for the encoder.
        samples: Its samples.
    """

    pixel_values: tuple[int, ...]
    samples: list[ShownSample]


@dataclass(frozen=True)
class _Feed:
    """What a stage's trainer is fed with."""

    stage: StageArguments
    data: RunData[Any]
    collator: CaptionCollator | InstructionCollator
    tokenizer: Any
    name: Callable[[int], str]


def first_batches(
    arguments: PretrainArguments | FinetuneArguments, count: int, stage: str | None = None
) -> Iterator[ShownBatch]:
    """Make the first batches of a run, as its trainer makes them in one process.

    Args:
        arguments: The recipe.
        count: How many samples are wanted.
        stage: Of which stage; the first with steps to do if not given.

    Raises:
        ValueError: If data, models or recipe do not fit together.
    """
    if stage is not None and stage not in arguments.stages:
        raise ValueError(unknown_name("stage", stage, arguments.stages))
    if isinstance(arguments, FinetuneArguments):
        feed = _conversations(arguments, stage)
    else:
        feed = _captions(arguments, stage)
    micro, _ = split_batch(feed.stage.batch_size, arguments.micro_batch_size, 1)
    train = feed.data.train
    sampler = LengthBucketedSampler(
        train.lengths,
        batch_size=feed.stage.batch_size,
        num_batches=-(-count // feed.stage.batch_size),
        seed=arguments.seed,
        parts=train.parts,
    )
    rows = iter(sampler)
    while count > 0:
        samples = [train[row] for row in islice(rows, micro)]
        batch = feed.collator(samples)
        shown = [
            ShownSample(
                sample["sample_id"],
                feed.name(sample["sample_id"]),
                [image.size for image in sample.get("images", [sample.get("image")])],
                _tokens(feed.tokenizer, batch, place),
                [f"{bad.source}: {bad.reason}" for bad in sample["bad_samples"]],
            )
            for place, sample in enumerate(samples[:count])
        ]
        yield ShownBatch(tuple(batch["pixel_values"].shape), shown)
        count -= len(shown)


def _captions(arguments: PretrainArguments, stage: str | None) -> _Feed:
    if arguments.miniature is not None:
        ensure_miniature(arguments.miniature)
    processor = _processor(arguments, arguments.data.max_text_tokens)
    data = load_run_data(arguments.data, processor)
    sources = open_parts(arguments.data).train
    collator = CaptionCollator(
        processor.image_processor,
        processor.tokenizer.pad_token_id,
        _image_tokens(arguments, processor),
    )
    chosen = stage or _first_stage(arguments.stages, data.samples)
    name = partial(_image_name, sources)
    return _Feed(arguments.stages[chosen], data, collator, processor.tokenizer, name)


def _conversations(arguments: FinetuneArguments, stage: str | None) -> _Feed:
    if arguments.miniature is not None:
        ensure_vlm_data(arguments.miniature)
    inputs = vlm_inputs(arguments.model)
    chosen = stage or _first_stage(arguments.stages, samples=1)
    data = load_instruction_data(getattr(arguments.data, chosen), inputs.form, inputs.image_tokens)
    processor = inputs.processor
    collator = InstructionCollator(
        processor.image_processor,
        processor.tokenizer.pad_token_id,
        inputs.form.image_token_id,
        inputs.image_tokens,
    )
    return _Feed(arguments.stages[chosen], data, collator, processor.tokenizer, data.train.name_of)


def _first_stage(stages: Mapping[str, StageArguments], samples: int) -> str:
    """The first stage that has steps to do."""
    return next((name for name in stages if stages[name].steps(samples) > 0), min(stages))


def _processor(arguments: PretrainArguments, max_text_tokens: int) -> HiveProcessor:
    model = arguments.model
    return HiveProcessor.from_backbones(
        model.vision, model.language, max_text_tokens=max_text_tokens
    )


def _image_tokens(arguments: PretrainArguments, processor: HiveProcessor) -> tuple[int, ...]:
    """The placeholder tokens of method sa; no weights are loaded to count them."""
    if arguments.method != "sa":
        return ()
    *_, count = build_on_meta(arguments)
    return (image_token_id(processor.tokenizer),) * count


def _image_name(sources: list[CaptionSource], number: int) -> str:
    """Name of a sample's image; samples are numbered through all sources."""
    for source in sources:
        if number < len(source.captions):
            return source.image_name(int(source.image_rows[number]))
        number -= len(source.captions)
    raise AssertionError(number)


def _tokens(tokenizer: Any, batch: dict[str, Tensor], place: int) -> list[tuple[str, str]]:
    """Text and use of each token of a sample in a batch."""
    rows = (batch[name][place].tolist() for name in ("input_ids", "attention_mask", "labels"))
    tokens = []
    for token, attended, label in zip(*rows, strict=True):
        use = PADDING if not attended else READ if label < 0 else LEARNED
        tokens.append((token_text(tokenizer, token), use))
    return tokens


def token_text(tokenizer: Any, token: int) -> str:
    """Write a token so that its spaces can be seen: ``·red``."""
    stored: str = tokenizer.convert_ids_to_tokens(token)
    text: str = tokenizer.decode([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return stored  # a part of a character
    if stored.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece's mark of a space, which decoding loses
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
