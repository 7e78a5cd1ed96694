"""Stored images: where they lie, how they are read, and what cannot be decoded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

_DECODER = datasets.Image()


class StoredImage(TypedDict):
    """An image as it is stored: its encoded bytes, or the file that holds them."""

    path: str | None
    bytes: bytes | None


class UnusableImageError(ValueError):
    """An image that cannot be read; the message is one line."""


def decode_image(stored: StoredImage) -> Image.Image:
    """Decode an image to RGB, upright.

    Raises:
        UnusableImageError: Whatever the decoder did not like.
    """
    if stored["path"] is None and stored["bytes"] is None:
        raise UnusableImageError("no image")
    try:
        image = _to_rgb(_DECODER.decode_example(stored))
    except Exception as error:  # a damaged file can make a decoder raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "cannot identify image" if unknown else " ".join(str(error).split())
        raise UnusableImageError(f"{type(error).__name__}: {reason}") from error
    return image


def read_image(stored: StoredImage, name: str) -> Image.Image:
    """Decode an image that somebody asked for, as ``decode_image``.

    Args:
        stored: The image.
        name: What to call it.

    Raises:
        UnusableImageError: Names it, and says why it cannot be read.
    """
    try:
        return decode_image(stored)
    except UnusableImageError as error:
        reason = str(error).partition(": ")[2] or str(error)  # without the class of the error
        path = stored["path"] if stored["bytes"] is None else None
        if path is not None and not Path(path).is_file():
            reason = "it is a folder" if Path(path).is_dir() else "it does not exist"
        raise UnusableImageError(
            f"image {name!r} cannot be read: {reason.rstrip('.')}; give another, or mend it"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # of which Pillow would make white or black
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Bring grey values of more than 8 bits to 8, by the range that they must be of."""
    highest = 1.0 if values.dtype.kind == "f" and values.max() <= 1 else 255.0
    if values.dtype == np.uint16 or values.max() > highest:  # 12 bits look like dark 16 bits
        highest = 65535.0 if values.max() <= 65535 else float(np.iinfo(np.int32).max)
    return (values * (256 / (highest + 1 if highest > 1 else 1))).clip(0, 255).astype(np.uint8)


def read_bytes(stored: StoredImage) -> bytes:
    """Read an image's encoded bytes.

    Raises:
        UnusableImageError: If there are none.
    """
    if stored["bytes"] is not None:
        return stored["bytes"]
    if stored["path"] is None:
        raise UnusableImageError("no image")
    try:
        return Path(stored["path"]).read_bytes()
    except FileNotFoundError as error:
        raise UnusableImageError("the file does not exist") from error
    except OSError as error:
        raise UnusableImageError(f"the file cannot be read: {error.strerror}") from error


class ImageStore(Protocol):
    """Images by row. Pickles small, and may be used after a fork."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, row: int) -> StoredImage:
        """Read one, not decoded."""
        ...

    def name(self, row: int) -> str:
        """What to call it: a path below its folder where there is one."""
        ...

    def facts(self) -> list[pa.ChunkedArray]:
        """Names and stored sizes, for a fingerprint that does not depend on where they lie."""
        ...

    @property
    def shards(self) -> NDArray[np.int64] | None:
        """Shard number of each image; ``None`` where any order is as fast."""
        ...


@dataclass(frozen=True, eq=False)
class ColumnImages:
    """Images in a column of a memory-mapped table: embedded, or as paths.

    Args:
        data: The table.
        column: Its column, as the datasets library stores images (bytes and path), or with
            paths or bytes alone.
        root: Folder that relative paths start from.
    """

    data: datasets.Dataset
    column: str
    root: str

    shards = None

    def __len__(self) -> int:
        return len(self.data)

    def read(self, row: int) -> StoredImage:
        """Read one, not decoded."""
        path, content = self._value(row)
        if path is not None and content is None:
            path = os.path.join(self.root, path)
        return StoredImage(path=path, bytes=content)

    def name(self, row: int) -> str:
        """Path below the root, or the row."""
        path = self._value(row)[0]
        return f"row {row}" if path is None else path.removeprefix(self._prefix)

    def facts(self) -> list[pa.ChunkedArray]:
        """Names and sizes of the embedded bytes."""
        stored = self.data.data.column(self.column)
        if pa.types.is_struct(stored.type):
            paths = pc.struct_field(stored, "path")
            content = pc.struct_field(stored, "bytes")
            empty = pa.types.is_null(content.type)
            sizes = content.cast(pa.int32()) if empty else pc.binary_length(content)
        elif _is_text(stored.type):
            paths, sizes = stored, pa.chunked_array([], pa.int32())
        else:
            paths, sizes = pa.chunked_array([], pa.string()), pc.binary_length(stored)
        return [_without_prefix(paths, self._prefix), sizes]

    @property
    def _prefix(self) -> str:
        return os.path.join(os.path.abspath(self.root), "")

    def _value(self, row: int) -> tuple[str | None, bytes | None]:
        value = self.data.data.column(self.column)[row].as_py()
        if isinstance(value, dict):
            return value["path"], value["bytes"]
        return (None, value) if isinstance(value, bytes) else (value, None)


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold images."""
    if pa.types.is_struct(kind):
        return {field.name for field in kind} >= {"bytes", "path"}
    return _is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _without_prefix(paths: pa.ChunkedArray, prefix: str) -> pa.ChunkedArray:
    paths = paths.cast(pa.large_string())
    inside = pc.fill_null(pc.starts_with(paths, prefix), False)
    return pc.if_else(inside, pc.utf8_slice_codeunits(paths, len(prefix)), paths)
