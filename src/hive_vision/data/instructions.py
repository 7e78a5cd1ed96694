"""Conversations about images in the forms of LLaVA, as token ids with what is learned of them.

A source has M conversations; each has any number of images, none included.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from hive_vision.conversation import IMAGE_TOKEN, EncodedConversation, Turn
from hive_vision.data.images import ColumnImages, UnusableImageError, decode_image, holds_images
from hive_vision.data.replacement import BadSample, ReplacingDataset, UnusableSampleError
from hive_vision.data.sampler import OrderedPart
from hive_vision.data.sources import (
    choose_split,
    combine_fingerprints,
    hash_column,
    hash_parts,
    load_splits,
)

ROLES = {
    **{"human": "user", "gpt": "assistant", "system": "system"},
    **{"user": "user", "assistant": "assistant"},
}
_FORMAT = "1"  # change it with what is stored: files are cached on users' disks

Encode = Callable[[Sequence[Turn]], EncodedConversation]


@dataclass(frozen=True)
class InstructionSource:
    """One set of conversations.

    Args:
        path: LLaVA's json file, or what the datasets library reads: folder, parquet, hub id.
        images: Folder that image paths start from; of a json file its own if null.
        split: Split to take; train, or the only one, if null.
        image_column: Column with an image, a list of images, or nothing.
        conversation_column: Column with the turns: from and value, or role and content.
        weight: Passes over this source in each epoch of a mixture.
    """

    path: str
    images: str | None = None
    split: str | None = None
    image_column: str = "image"
    conversation_column: str = "conversations"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no source can have."""
        if not self.weight > 0:
            raise ValueError(f"weight of {self.path!r} is {self.weight}; it must be above 0")


@dataclass(frozen=True, eq=False)
class Instructions:
    """Conversations with their images. Nothing is decoded here; the images stay where they lie.

    Args:
        name: What to call them: path, and split unless that is ``train``.
        conversations: (M,) in column ``turns``, as they are stored.
        images: Where images are read from.
        image_rows: Rows of all conversations' images there, one after another.
        first_image: (M + 1,) where each conversation's images begin among them.
        fingerprint: Changes with conversations, image names and sizes, and what was selected.
    """

    name: str
    conversations: datasets.Dataset
    images: ColumnImages
    image_rows: NDArray[np.int64]
    first_image: NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def samples(self) -> int:
        """M."""
        return len(self)

    def first(self, count: int) -> "Instructions":
        """Keep the first conversations."""
        return self.select(np.arange(count))

    def stored_turns(self, row: int) -> list[dict[str, str]]:
        """Give a conversation's turns as they are stored."""
        turns: list[dict[str, str]] = self.conversations[row]["turns"]
        return turns

    def rows_of_images(self, row: int) -> list[int]:
        """Give the stored rows of a conversation's images."""
        first, last = self.first_image[row : row + 2]
        return [int(stored) for stored in self.image_rows[first:last]]

    def select(self, rows: NDArray[np.int64]) -> "Instructions":
        """Keep some conversations, in the order given."""
        counts = np.diff(self.first_image)[rows]
        first = np.concatenate([[0], np.cumsum(counts)])
        chosen = np.repeat(self.first_image[rows] - first[:-1], counts) + np.arange(first[-1])
        return replace(
            self,
            conversations=self.conversations.select(rows),
            image_rows=self.image_rows[chosen],
            first_image=first,
            fingerprint=hash_parts(self.fingerprint.encode(), b"rows", rows.tobytes()),
        )


def open_instructions(source: InstructionSource) -> Instructions:
    """Open a source without reading its images.

    Raises:
        ValueError: If nothing is found, or a split or column is missing (those found are named).
    """
    path = Path(source.path)
    root = source.images or (str(path.parent) if path.is_file() else source.path)
    if path.is_file() and _starts_with_list(path):
        data = _read_json(path)
        source = replace(source, image_column="image", conversation_column="conversations")
        name = source.path
    else:
        splits = load_splits(source.path)
        split = source.split or "train"
        data = choose_split(splits, split, source.path)
        name = source.path if split == "train" else f"{source.path}:{split}"
    for key in ("image_column", "conversation_column"):
        column = getattr(source, key)
        if column not in data.column_names:
            raise ValueError(
                f"{source.path!r} has no column {column!r}; its columns are "
                f"{', '.join(data.column_names)}: set {key}"
            )
    conversations = data.data.column(source.conversation_column)
    if not _holds_turns(conversations.type):
        raise ValueError(
            f"conversation column {source.conversation_column!r} of {source.path!r} holds "
            f"{conversations.type}, not lists of turns (from and value, or role and content)"
        )
    images, rows, first = _images(data, source, root)
    facts = [*_hash_turns(conversations), *(hash_column(column) for column in images.facts())]
    fingerprint = hash_parts(*facts, rows.tobytes(), first.tobytes())
    own = data.select_columns([source.conversation_column])
    if source.conversation_column != "turns":
        own = own.rename_column(source.conversation_column, "turns")
    return Instructions(name, own, images, rows, first, fingerprint)


def _starts_with_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def _hash_turns(conversations: pa.ChunkedArray) -> list[bytes]:
    """Hash roles, texts and where conversations end, without making Python objects."""
    turns = [chunk.flatten() for chunk in conversations.chunks]
    lengths = pc.fill_null(pc.list_value_length(conversations), 0).to_numpy().astype("<i8")
    hashes = [hashlib.sha256(lengths.tobytes()).digest()]
    for field in conversations.type.value_type:
        if field.name in ("from", "value", "role", "content"):
            texts = [pc.struct_field(chunk, field.name) for chunk in turns]
            hashes.append(hash_column(pa.chunked_array(texts, field.type)))
    return hashes


def _holds_turns(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    names = {field.name for field in kind.value_type} if pa.types.is_struct(kind.value_type) else ()
    return {"from", "value"} <= set(names) or {"role", "content"} <= set(names)


def _images(
    data: datasets.Dataset, source: InstructionSource, root: str
) -> tuple[ColumnImages, NDArray[np.int64], NDArray[np.int64]]:
    """Find each conversation's images; nothing is copied.

    Returns:
        Store of single images, rows in it, and where each conversation's begin.
    """
    column = data.data.column(source.image_column)
    several = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    kind = column.type.value_type if several else column.type
    if pa.types.is_null(kind):  # text only
        empty = datasets.Dataset(pa.table({source.image_column: pa.array([], pa.string())}))
        images = ColumnImages(empty, source.image_column, root)
        return images, np.zeros(0, np.int64), np.zeros(len(data) + 1, np.int64)
    if not holds_images(kind):
        raise ValueError(
            f"image column {source.image_column!r} of {source.path!r} holds {kind}, not images"
        )
    if several:
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        chunks = [chunk.flatten() for chunk in column.chunks]
        flat = pa.table({source.image_column: pa.chunked_array(chunks, kind)})
        images = ColumnImages(datasets.Dataset(flat), source.image_column, root)
        rows = np.arange(len(flat))
    else:
        there = pc.is_valid(column)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            there = pc.and_(there, pc.not_equal(pc.fill_null(column, ""), ""))
        counts = there.to_numpy().astype(np.int64)
        data = data.cast_column(source.image_column, datasets.Image(decode=False))
        images = ColumnImages(data, source.image_column, root)
        rows = np.flatnonzero(counts)
    return images, rows, np.concatenate([[0], np.cumsum(counts)])


def _read_json(path: Path) -> datasets.Dataset:
    """Read LLaVA's json; cached until the file changes.

    Raises:
        ValueError: If it is not of this form.
    """
    state = os.stat(path)
    facts = (_FORMAT, os.path.abspath(path), state.st_size, state.st_mtime_ns)
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(
        {"image": datasets.List(datasets.Value("string")), "conversations": datasets.List(turn)}
    )
    try:
        return datasets.Dataset.from_generator(
            _json_rows,
            features=features,
            gen_kwargs={"path": os.path.abspath(path)},
            fingerprint=datasets.fingerprint.Hasher.hash(facts),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(" ".join(str(reason).split())) from error


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        for sample in json.loads(Path(path).read_bytes()):
            images = sample.get("image") or []
            turns = sample["conversations"]
            yield {
                "image": [images] if isinstance(images, str) else images,
                "conversations": [{"role": t["from"], "content": t["value"]} for t in turns],
            }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path!r} is not llava json, a list of {{"image": ..., "conversations": [{{"from": '
            f'"human", "value": ...}}, ...]}} ({type(error).__name__}: {error})'
        ) from error


def split_off(data: Instructions, share: float, least: int) -> tuple[Instructions, Instructions]:
    """Split off held-out conversations, always the same ones.

    Args:
        data: What to split.
        share: Of the conversations to split off.
        least: Of small sets more, up to so many or a fifth.

    Raises:
        ValueError: If there are not enough.
    """
    size = max(1, round(share * len(data)), min(least, len(data) // 5))
    if size >= len(data):
        raise ValueError(
            f"{data.name!r} has {len(data)} conversations, of which {size} would be held out; give "
            "more, or a smaller holdout"
        )
    order = np.random.default_rng(0).permutation(len(data))
    return data.select(np.sort(order[size:])), data.select(np.sort(order[:size]))


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
    """One training sample: RGB images, and a conversation as token ids."""

    images: list[Image.Image]
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
            images = [decode_image(source.images.read(at)) for at in stored]
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
