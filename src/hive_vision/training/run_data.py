"""The data of a run: from a recipe's ``data`` section to samples with token ids."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from hive_vision.data.captions import MIN_HELD_OUT, CaptionDataset, split_held_out
from hive_vision.data.features import FeatureStore
from hive_vision.data.instruction_sources import Instructions, open_instructions, split_off
from hive_vision.data.instructions import InstructionDataset
from hive_vision.data.quarantine import read_quarantine, usable_pairs
from hive_vision.data.sources import (
    CaptionSource,
    choose_split,
    combine_fingerprints,
    open_source,
)
from hive_vision.models.chat_templates import ConversationFormat
from hive_vision.models.processing import HiveProcessor
from hive_vision.training.arguments import DataArguments, InstructionArguments

logger = logging.getLogger(__name__)

D = TypeVar("D", CaptionDataset, InstructionDataset)
S = TypeVar("S", CaptionSource, Instructions)


@dataclass(frozen=True)
class RunData(Generic[D]):
    """What a run reads.

    Attributes:
        train: Captions or conversations to learn from.
        held_out: Those to judge by.
        fingerprint: Changes when what is learned from changes, or what is known of their
            images without opening them (docs/reliability.md).
        samples: Samples in an epoch: pairs to learn from, with the weights of a mixture.
        excluded: Pairs to learn from that are left out, being in quarantine.
        num_workers: Processes that read images beside the trainer.
        unit: What the samples are.
    """

    train: D
    held_out: D
    fingerprint: str
    samples: int
    excluded: int
    num_workers: int
    unit: str = "captions"

    def with_features(self, store: FeatureStore) -> Self:
        """Give the same data with features of a store: first all images to learn from."""
        held_out = self.held_out.with_features(store, len(self.train.distinct_images))
        return replace(self, train=self.train.with_features(store, 0), held_out=held_out)

    @property
    def facts(self) -> dict[str, Any]:
        """What manifests say of it."""
        return {
            "fingerprint": self.fingerprint,
            self.unit: len(self.train),
            "excluded": self.excluded,
        }


@dataclass(frozen=True)
class DataParts:
    """All sources of a recipe, nothing left out yet.

    Attributes:
        train: Parts to learn from.
        weights: Passes over each of them in an epoch.
        held_out: Parts to judge by. One that was split off has the name of its source, and
            ``rows`` of a part are the images' rows in the whole source.
        fingerprint: Of all of it; what a quarantine file is about.
    """

    train: list[CaptionSource]
    weights: list[float]
    held_out: list[CaptionSource]
    fingerprint: str


def open_parts(data: DataArguments) -> DataParts:
    """Open the sources of a recipe and set held-out images aside.

    Args:
        data: The recipe's ``data`` section.

    Raises:
        ValueError: If nothing is found, or columns or splits are missing.
    """
    train, held_out, fingerprints = [], [], []
    names: set[str] = set()
    for source in data.train_sources():
        splits = open_source(source)
        own = splits.pop("validation", None) if source.split is None else None
        whole = _named(choose_split(splits, source.split or "train", source.path), names)
        fingerprints.append(whole.fingerprint)
        if data.validation is not None:
            train.append(whole)
        elif own is not None:
            train.append(whole)
            held_out.append(_named(own, names))
            fingerprints.append(own.fingerprint)
        else:
            rest, split_off = split_held_out(whole, data.holdout)
            train.append(rest)
            held_out.append(split_off)
    for source in data.validation_sources():
        whole = choose_split(open_source(source), source.split or "validation", source.path)
        held_out.append(_named(whole, names))
        fingerprints.append(whole.fingerprint)
    weights = [source.weight for source in data.train_sources()]
    return DataParts(train, weights, held_out, combine_fingerprints(*fingerprints))


def load_run_data(data: DataArguments, processor: HiveProcessor) -> RunData[CaptionDataset]:
    """Load training and held-out captions and tokenize them.

    Args:
        data: The recipe's ``data`` section.
        processor: Holds the tokenizer.

    Raises:
        ValueError: If nothing is found, columns are missing, or nothing is left.
    """
    # The first process fills the caches, the others find them.
    with PartialState().local_main_process_first():
        parts = open_parts(data)
        quarantine = {}
        if data.quarantine is not None:
            quarantine = read_quarantine(data.quarantine, parts.fingerprint)
        usable = [usable_pairs(part, quarantine) for part in parts.train]
        sources = [_select(part, rows) for part, rows in zip(parts.train, usable, strict=True)]
        judges = [_select(part, usable_pairs(part, quarantine)) for part in parts.held_out]
        judges = _at_most(data.max_held_out, judges)
        for purpose, chosen in (("learn from", sources), ("judge by", judges)):
            if not any(len(source.captions) for source in chosen):
                raise ValueError(f"there are no captions to {purpose} in {_names(parts.train)}")
        encode, encoding = processor.encode_captions, _caption_encoding(processor)
        kept = np.concatenate(usable)
        train = CaptionDataset(
            sources,
            encode,
            weights=parts.weights,
            sample_ids=np.flatnonzero(kept),
            encoding=encoding,
            group_captions=data.group_captions,
        )
        held_out = CaptionDataset(
            judges, encode, encoding=encoding, group_captions=data.group_captions
        )
    excluded = int(len(kept) - kept.sum())
    logger.info(
        "%s: %d captions to learn from, %d in quarantine; %s: %d held out",
        *(_names(sources), len(train), excluded, _names(judges), len(held_out)),
    )
    fingerprint = combine_fingerprints(
        *(source.fingerprint for source in sources), *map(str, parts.weights)
    )
    return RunData(train, held_out, fingerprint, train.epoch_size, excluded, data.num_workers)


def load_instruction_data(
    data: InstructionArguments, form: ConversationFormat, image_tokens: int
) -> RunData[InstructionDataset]:
    """Load training and held-out conversations and tokenize them.

    Args:
        data: The section of a recipe's ``data`` for a stage.
        form: Makes token ids of them.
        image_tokens: Tokens that each image becomes.

    Raises:
        ValueError: If nothing is found, or too many conversations have nothing to learn from.
    """
    with PartialState().local_main_process_first():
        train = [open_instructions(source) for source in data.train_sources()]
        held_out = [open_instructions(source) for source in data.validation_sources()]
        if not held_out:
            parts = [split_off(source, data.holdout, MIN_HELD_OUT) for source in train]
            train, held_out = (list(part) for part in zip(*parts, strict=True))
        held_out = _at_most(data.max_held_out, held_out)
        weights = [source.weight for source in data.train_sources()]
        learned, judged = (
            InstructionDataset(
                sources,
                form.encode,
                _encoding(form.tokenizer, template=form.template),
                image_token_id=form.image_token_id,
                image_tokens=image_tokens,
                max_tokens=data.max_tokens,
                weights=weights if sources is train else None,
            )
            for sources in (train, held_out)
        )
    names = ", ".join(source.name for source in train)
    _check_learned(learned, data.max_unlearned_fraction, names)
    logger.info(
        "%s: %d conversations to learn from, %d cut to %d tokens; %d held out",
        *(names, len(learned), learned.cut, data.max_tokens, len(judged)),
    )
    fingerprint = combine_fingerprints(
        *(source.fingerprint for source in train), *map(str, weights), form.template
    )
    size = learned.epoch_size
    return RunData(learned, judged, fingerprint, size, 0, data.num_workers, "conversations")


def _check_learned(data: InstructionDataset, allowed: float, names: str) -> None:
    """Refuse data of which too much cannot be learned from.

    Raises:
        ValueError: Names the first conversations, and why.
    """
    if len(data.problems) > allowed * len(data):
        rows = [f"row {row}: {reason}" for row, reason in list(data.problems.items())[:3]]
        raise ValueError(
            f"{len(data.problems)} of {len(data)} conversations of {names} have nothing to learn "
            f"from ({'; '.join(rows)}); mend or remove them, or raise max_unlearned_fraction "
            f"({allowed:g})"
        )


def _select(source: CaptionSource, usable: NDArray[np.bool_]) -> CaptionSource:
    return source if usable.all() else source.select_pairs(np.flatnonzero(usable))


def _named(source: CaptionSource, names: set[str]) -> CaptionSource:
    """Give a source that is used twice a name of its own."""
    name, number = source.name, 1
    while name in names:
        number += 1
        name = f"{source.name} ({number})"
    names.add(name)
    return replace(source, name=name)


def _names(sources: list[CaptionSource]) -> str:
    return ", ".join(source.name for source in sources)


def _at_most(limit: int, sources: list[S]) -> list[S]:
    """Cut held-out sources, each by the same share, to some number of samples together."""
    sizes: NDArray[np.int64] = np.array([source.samples for source in sources])
    if sizes.sum() <= limit:
        return sources
    ends = np.round(np.cumsum([0, *sizes]) * (limit / sizes.sum())).astype(int)
    return [source.first(size) for source, size in zip(sources, np.diff(ends), strict=True) if size]


def _encoding(tokenizer: Any, **facts: Any) -> str:
    """Identify how text becomes token ids, by the tokenizer's content and what else decides."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}  # of its last call
    else:
        content = sorted(tokenizer.get_vocab().items())
    facts |= {"content": content, "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _caption_encoding(processor: HiveProcessor) -> str:
    return _encoding(
        processor.tokenizer,
        start=processor.start_token_id,
        end=processor.tokenizer.eos_token_id,
        max_text_tokens=processor.max_text_tokens,
    )
