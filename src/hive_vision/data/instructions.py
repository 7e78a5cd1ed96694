"""Conversations about images as token ids, with what is learned of them.

A source has M conversations; each has any number of images, none included.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypedDict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hive_vision.conversation import IMAGE_TOKEN, EncodedConversation, Turn
from hive_vision.data.features import DistinctImages, FeatureStore
from hive_vision.data.images import UnusableImageError, decode_image
from hive_vision.data.instruction_sources import Instructions
from hive_vision.data.replacement import BadSample, ReplacingDataset, UnusableSampleError
from hive_vision.data.sampler import OrderedPart
from hive_vision.data.sources import (
    combine_fingerprints,
)

ROLES = {
    **{"human": "user", "gpt": "assistant", "system": "system"},
    **{"user": "user", "assistant": "assistant"},
}
_FORMAT = "1"  # change it with what is stored: files are cached on users' disks

Encode = Callable[[Sequence[Turn]], EncodedConversation]


def read_turns(stored: Sequence[Mapping[str, Any]] | None, images: int) -> list[Turn]:
    """Bring stored turns to one form, with as many ``<image>`` as there are images.

    As LLaVA does: a single image goes to the front of its turn, and to the front of the first one
    where the text does not say; what the assistant says unasked is left out.

    Args:
        stored: Turns with ``from`` and ``value``, or ``role`` and ``content``.
        images: How many images the conversation has.

    Raises:
        ValueError: If roles or images do not fit; one line.
    """
    turns: list[Turn] = []
    for turn in stored or ():
        given = turn["role"] if "role" in turn else turn["from"]
        content = turn["content"] if "role" in turn else turn["value"]
        if given not in ROLES:
            raise ValueError(f"role {given!r} is none of {', '.join(ROLES)}")
        role, content = ROLES[given], (content or "").strip()
        if role == "assistant" and not any(said["role"] == "user" for said in turns):
            continue
        if role == "assistant" and IMAGE_TOKEN in content:
            raise ValueError("an answer has an image")
        if content.count(IMAGE_TOKEN) == 1:
            content = f"{IMAGE_TOKEN}\n{content.replace(IMAGE_TOKEN, '').strip()}"
        turns.append(Turn(role=role, content=content))  # type: ignore[typeddict-item]
    marks = sum(turn["content"].count(IMAGE_TOKEN) for turn in turns)
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if images and not marks and first is not None:
        first["content"] = f"{IMAGE_TOKEN}\n" * images + first["content"]
    elif marks != images:
        raise ValueError(f"{marks} {IMAGE_TOKEN} in the text but {images} images")
    return turns


class Instruction(TypedDict):
    """One training sample: images, and a conversation as token ids.

    Images are in RGB, or their features (S, N, D) where they are stored.
    """

    images: list[Image.Image | Tensor]
    input_ids: list[int]
    learned: list[tuple[int, int]]
    sample_id: int
    bad_samples: list[BadSample]


class InstructionDataset(ReplacingDataset[Instruction]):
    """The conversations of some sources as samples, bad ones replaced.

    Bad is an unreadable image, or a conversation with nothing to learn from. Token ids are made
    once and then read from disk where they are needed.

    Args:
        sources: M conversations together.
        encode: A conversation to token ids, e.g. ``ConversationFormat.encode``.
        encoding: Identifies ``encode``, so that token ids of earlier runs can be used again.
        image_token_id: Of ``<image>``.
        image_tokens: N tokens that each image becomes.
        max_tokens: Longer conversations are cut, never inside an image.
        weights: Passes over each source in an epoch; one each if not given.

    Attributes:
        lengths: (M,) tokens, images included.
        problems: Row -> why it cannot be used.
        cut: How many conversations were cut.
        fingerprint: Changes with the sources.
    """

    def __init__(
        self,
        sources: Sequence[Instructions],
        encode: Encode,
        encoding: str,
        *,
        image_token_id: int,
        image_tokens: int,
        max_tokens: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._sources = list(sources)
        self.fingerprint = combine_fingerprints(*(source.fingerprint for source in sources))
        self._features: FeatureStore | None = None
        self._first_feature = 0
        self._first_rows = np.cumsum([0, *map(len, sources)]).tolist()
        self._image_token_id = image_token_id
        limits = _Limits(image_token_id, image_tokens, max_tokens)
        self._tokens = [_tokenize(source, encode, encoding, limits) for source in sources]
        self.lengths: NDArray[np.int64] = self._column("length").to_numpy().astype(np.int64)
        self.cut = int(pc.sum(self._column("cut")).as_py() or 0)
        reasons = self._column("problem")
        bad = np.flatnonzero(pc.not_equal(reasons, "").to_numpy())
        self.problems: dict[int, str] = {int(row): reasons[int(row)].as_py() for row in bad}
        self.parts = [
            OrderedPart(len(source), weight)
            for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
        ]

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token ids behind; their tables travel as the names of their files."""
        return {key: value for key, value in self.__dict__.items() if key != "_token_ids"}

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch, with the weights of the sources."""
        return sum(part.per_epoch for part in self.parts)

    @cached_property
    def distinct_images(self) -> DistinctImages:
        """The images of all samples."""
        sources = self._sources
        return DistinctImages([s.images for s in sources], [s.image_rows for s in sources])

    @property
    def images_per_sample(self) -> float:
        """How many images are encoded for a sample, on average."""
        return sum(len(source.image_rows) for source in self._sources) / len(self)

    def with_features(self, store: FeatureStore, first: int) -> Self:
        """Give the same samples with features from a store for images.

        Args:
            store: Has them.
            first: Its row with the first of ``distinct_images``.
        """
        data = copy(self)
        data._features, data._first_feature = store, first
        return data

    @cached_property
    def _token_ids(self) -> list[tuple[pa.ChunkedArray, pa.ChunkedArray]]:
        tables = (tokens.data for tokens in self._tokens)
        return [(table.column("input_ids"), table.column("learned")) for table in tables]

    def _column(self, name: str) -> pa.ChunkedArray:
        columns = [tokens.data.column(name) for tokens in self._tokens]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks])

    def name_of(self, row: int) -> str:
        """What to call a sample in messages."""
        part = bisect_right(self._first_rows, row) - 1
        return f"{self._sources[part].name} row {row - self._first_rows[part]}"

    def read(self, row: int, bad: list[UnusableSampleError]) -> Instruction:
        """Read a sample that takes the place of those that could not be used."""
        part = bisect_right(self._first_rows, row) - 1
        source, inside = self._sources[part], row - self._first_rows[part]
        name = self.name_of(row)
        if row in self.problems:
            raise UnusableSampleError(row, name, self.problems[row])
        ids, learned = (column[inside].as_py() for column in self._token_ids[part])
        # Images behind the cut have no place.
        stored = source.rows_of_images(inside)[: ids.count(self._image_token_id)]
        try:
            if self._features is None:
                images: list[Image.Image | Tensor]
                images = [decode_image(source.images.read(at)) for at in stored]
            else:
                first, number = self._first_feature, self.distinct_images.number
                images = [self._features.read(first + number(part, at)) for at in stored]
        except (UnusableImageError, OSError) as error:
            raise UnusableSampleError(row, name, str(error)) from error
        return Instruction(
            images=images,
            input_ids=ids,
            learned=list(zip(learned[::2], learned[1::2], strict=True)),
            sample_id=row,
            bad_samples=[error.replaced_by(row) for error in bad],
        )

    def with_images_of(self, row: int, other: int) -> Instruction:
        """Give a sample with another one's images, as far as that has any, over and over."""
        sample, images = self[row], self[other]["images"]
        if images:
            count = len(sample["images"])
            sample["images"] = [images[place % len(images)] for place in range(count)]
        return sample


@dataclass(frozen=True)
class _Limits:
    """What decides how long a conversation is, and where it is cut."""

    image_token_id: int
    image_tokens: int
    max_tokens: int

    def cut(self, encoded: EncodedConversation) -> tuple[EncodedConversation, int]:
        """Cut a conversation, where it must be; its tokens with all of its images' tokens."""
        ids = np.array(encoded.input_ids, dtype=np.int64)
        ends = np.cumsum(np.where(ids == self.image_token_id, self.image_tokens, 1))
        kept = int(np.searchsorted(ends, self.max_tokens, side="right"))
        if kept == len(ids):
            return encoded, int(ends[-1]) if kept else 0
        learned = tuple((a, min(b, kept)) for a, b in encoded.learned if a < kept)
        problem = "" if learned else f"no answer within {self.max_tokens} tokens"
        cut = EncodedConversation(encoded.input_ids[:kept], learned, problem)
        return cut, int(ends[kept - 1]) if kept else 0


def _tokenize(
    source: Instructions, encode: Encode, encoding: str, limits: _Limits
) -> datasets.Dataset:
    """Make token ids of a source's conversations, or find those that an earlier run has made."""
    key = combine_fingerprints(_FORMAT, source.fingerprint, encoding, repr(limits))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hive-vision"
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.diff(source.first_image)

    def encode_one(turns: Sequence[Mapping[str, Any]], images: int) -> dict[str, Any]:
        try:
            encoded = encode(read_turns(turns, images))
        except ValueError as error:
            encoded = EncodedConversation(problem=str(error))
        kept, length = limits.cut(encoded)
        return {
            "input_ids": kept.input_ids,
            "learned": [place for span in kept.learned for place in span],
            "length": length,
            "cut": len(kept.input_ids) < len(encoded.input_ids),
            "problem": kept.problem,
        }

    def encode_batch(
        batch: Mapping[str, Sequence[Any]], places: Sequence[int]
    ) -> dict[str, list[Any]]:
        images = counts[places].tolist()
        rows = [encode_one(*row) for row in zip(batch["turns"], images, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    numbers = datasets.List(datasets.Value("int32"))
    return source.conversations.map(
        encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=["turns"],
        features=datasets.Features(
            {
                "input_ids": numbers,
                "learned": numbers,
                "length": datasets.Value("int32"),
                "cut": datasets.Value("bool"),
                "problem": datasets.Value("string"),
            }
        ),
        cache_file_name=str(folder / f"conversations-{key}.arrow"),
        new_fingerprint=key,
        desc="tokenizing conversations",
    )
