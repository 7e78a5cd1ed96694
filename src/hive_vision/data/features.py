"""Features of images in a file: computed once by an encoder that is frozen, then read again.

A store has K rows, one for each image; S layers, N tokens, width D.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hive_vision.data.images import ImageStore, UnusableImageError, decode_image
from hive_vision.folders import read_json, write_json

SAVE_SECONDS = 5.0  # what a kill -9 can lose of the pass over all images


class DistinctImages:
    """The images of a data set, each once, in the order in which they lie.

    Args:
        stores: Where images are read from.
        rows: For each of them the rows that are used, in any order and repeated at will.
    """

    def __init__(self, stores: Sequence[ImageStore], rows: Sequence[NDArray[np.int64]]) -> None:
        self._stores = stores
        self._first = np.cumsum([0, *map(len, stores)])
        used = [first + part for first, part in zip(self._first[:-1], rows, strict=True)]
        self._places: NDArray[np.int64] = np.unique(np.concatenate(used))

    def __len__(self) -> int:
        return len(self._places)

    def number(self, part: int, row: int) -> int:
        """Give the number here of the image in row ``row`` of store ``part``."""
        return int(np.searchsorted(self._places, self._first[part] + row))

    def decode(self, number: int) -> Image.Image:
        """Read image ``number``.

        Raises:
            UnusableImageError: If it cannot be decoded.
            OSError: If it cannot be read.
        """
        place = self._places[number]
        part = int(np.searchsorted(self._first, place, side="right")) - 1
        return decode_image(self._stores[part].read(int(place - self._first[part])))


class FeatureStore:
    """Features in a folder: rows one after another in one file, read through a memory map.

    An interrupted pass goes on behind the last row that is known to be whole; what belongs to other
    features is not used. Pickles small, and may be used after a fork.

    Args:
        folder: ``features.bin`` and ``features.json``.
        fingerprint: Of everything that decides the features.
        count: K.
        shape: (S, N, D).
        dtype: bfloat16 or float32.

    Attributes:
        done: Rows that are there.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        count: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.folder = folder
        self.count = count
        self.shape = tuple(shape)
        self.dtype = dtype
        self._facts = {"fingerprint": fingerprint, "shape": [count, *shape], "dtype": str(dtype)}
        self._file = folder / "features.bin"
        self._map: NDArray[np.uint8] | None = None
        self._saved = time.monotonic()
        state = read_json(folder / "features.json") or {}
        there = self._file.stat().st_size if self._file.exists() else 0
        is_same = all(state.get(name) == fact for name, fact in self._facts.items())
        is_whole = is_same and there >= state["done"] * self.row_bytes
        self.done: int = state["done"] if is_whole else 0
        self._bad: dict[int, str] = {}
        if is_whole:
            self._bad = {int(row): reason for row, reason in state["bad"].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map behind; it is opened where it is needed."""
        return {**self.__dict__, "_map": None}

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return row_bytes(self.shape, self.dtype)

    @property
    def is_complete(self) -> bool:
        """Whether all rows are there."""
        return self.done == self.count

    def append(self, features: Tensor, reasons: Sequence[str | None]) -> None:
        """Write the next rows.

        Args:
            features: (n, S, N, D).
            reasons: (n,) why an image cannot be used; its row means nothing.

        Raises:
            OSError: If there is no room for them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.done == 0:  # no other features' note may stand beside these
            (self.folder / "features.json").unlink(missing_ok=True)
        content: Any = features.to(self.dtype).contiguous().view(torch.uint8).numpy()
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.seek(self.done * self.row_bytes)
            file.truncate()
            file.write(memoryview(content))
        bad = {row: reason for row, reason in enumerate(reasons, self.done) if reason is not None}
        self._bad |= bad
        self.done += len(features)
        if self.is_complete or time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Note how far it is, when the rows are safe on the disk."""
        if not self._file.exists():
            return
        with self._file.open("r+b") as file:
            os.fsync(file.fileno())
        write_json(
            self.folder / "features.json", {**self._facts, "done": self.done, "bad": self._bad}
        )
        self._saved = time.monotonic()

    def read(self, row: int) -> Tensor:
        """Read the features of an image, (S, N, D).

        Raises:
            UnusableImageError: If the image could not be used.
        """
        if row in self._bad:
            raise UnusableImageError(self._bad[row])
        if self._map is None:
            self._map = np.memmap(self._file, np.uint8, "r", shape=(self.count, self.row_bytes))
        # A copy: the map cannot be written to, which a tensor does not know.
        return torch.from_numpy(self._map[row].copy()).view(self.dtype).view(self.shape)

    def free_bytes(self) -> int:
        """Room on the disk, with that which older features take here."""
        there = sum(path.stat().st_size for path in self.folder.glob("*"))
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return shutil.disk_usage(place).free + there


def row_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Give the size of one image's features."""
    return int(np.prod(shape)) * dtype.itemsize
