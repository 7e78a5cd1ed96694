"""Conversations about images in the forms people have: one view of all of them.

A source has M conversations; each has any number of images, none included.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hive_vision.data.images import ColumnImages, holds_images
from hive_vision.data.sources import (
    choose_split,
    hash_column,
    hash_parts,
    load_splits,
)

_FORMAT = "1"  # change it with what is stored: files are cached on users' disks


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
