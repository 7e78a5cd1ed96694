"""The data of a recipe before it is trained on: what cannot be used, and what a model is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hive_vision.data.quarantine import write_quarantine
from hive_vision.data.verification import Inspection, caption_lengths, inspect_source, summarise
from hive_vision.folders import write_json
from hive_vision.studies.feed import caption_processor, open_feed
from hive_vision.training.arguments import FinetuneArguments, PretrainArguments
from hive_vision.training.miniature import ensure_miniature
from hive_vision.training.run_data import open_parts

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
    processor = caption_processor(arguments, NOT_CUT)
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
    feed = open_feed(arguments, stage)
    rows = feed.micro_batches()
    while count > 0:
        samples = [feed.data.train[row] for row in next(rows)]
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
