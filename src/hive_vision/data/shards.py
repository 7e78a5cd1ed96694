"""Captioned images in tar shards (the WebDataset convention), read where they lie.

A shard holds for each sample KEY an image (KEY.jpg, .jpeg, .png or .webp) and its captions:
KEY.txt, or KEY.json whose ``caption`` is a text or a list of texts. One index of all shards, made
once, says where each image starts; a random sample then costs one read.
"""

import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hive_vision.data.images import StoredImage

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX = "index.arrow"  # beside the shards of built data
INDEX_FEATURES = datasets.Features(
    {
        "shard": datasets.Value("int32"),  # position in the sorted list of *.tar
        "offset": datasets.Value("int64"),  # of the image's first byte in the shard
        "size": datasets.Value("int64"),
        "name": datasets.Value("string"),  # KEY.jpg
        "caption": datasets.List(datasets.Value("string")),
    }
)
SHARD_SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")  # x-{00000..00099}.tar
MAX_OPEN_SHARDS = 64
_INDEX_FORMAT = 1  # change it with what the index holds: old ones are cached on users' disks


def find_shards(path: str) -> dict[str, list[Path]]:
    """Find tar shards by split.

    Args:
        path: A folder with ``*.tar``, one with such a folder for each split, or a pattern
            like ``shards/cc3m-{00000..00099}.tar``.

    Raises:
        ValueError: If a shard of a pattern is missing.
    """
    span = SHARD_SPAN.search(path)
    if span:
        first, last = span.groups()
        head, tail = path[: span.start()], path[span.end() :]
        width = len(first)
        shards = [
            Path(f"{head}{number:0{width}}{tail}") for number in range(int(first), int(last) + 1)
        ]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing or not shards:
            raise ValueError(
                f"{path!r} names {len(shards)} shards, {len(missing)} of them are missing"
                + (f", first {str(missing[0])!r}" if missing else "")
            )
        return {"train": shards}
    folder = Path(path)
    if folder.is_file():
        return {"train": [folder]}
    if found := sorted(folder.glob("*.tar")):
        return {"train": found}
    inside = {part.name: sorted(part.glob("*.tar")) for part in sorted(folder.glob("*/"))}
    return {split: shards for split, shards in inside.items() if shards}


def index_shards(shards: Sequence[Path], caption_key: str = "caption") -> datasets.Dataset:
    """Say where each image of some shards starts; cached until a shard changes.

    Args:
        shards: Tar files, not compressed.
        caption_key: Key of the caption in KEY.json.

    Returns:
        Columns as in ``INDEX_FEATURES``, in the order of the shards.

    Raises:
        ValueError: If a shard cannot be read, or holds no samples.
    """
    paths = [os.path.abspath(shard) for shard in shards]
    states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, paths)]
    fingerprint = datasets.fingerprint.Hasher.hash((_INDEX_FORMAT, paths, states, caption_key))
    try:
        return datasets.Dataset.from_generator(
            _index_rows,
            features=INDEX_FEATURES,
            gen_kwargs={
                # The datasets library calls the generator for each element of a list alone.
                "shards": list(enumerate(paths)),
                "caption_key": caption_key,
            },
            fingerprint=fingerprint,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(" ".join(str(reason).split())) from error
    except ValueError as error:  # "corresponds to no data"
        raise ValueError(
            f"no samples in {str(shards[0])!r}: a shard holds KEY.jpg, .png or .webp with KEY.txt "
            "or KEY.json"
        ) from error


def _index_rows(shards: list[tuple[int, str]], caption_key: str) -> Iterator[dict[str, Any]]:
    for number, shard in shards:
        sample: dict[str, Any] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    key, suffix = _split_key(member.name)
                    if sample.get("key") != key:
                        yield from _whole(sample)
                        sample = {"key": key, "shard": number}
                    if suffix in IMAGE_SUFFIXES:
                        sample |= {"offset": member.offset_data, "size": member.size}
                        sample["name"] = member.name
                    elif suffix in ("txt", "json"):
                        file = archive.extractfile(member)
                        assert file is not None
                        sample["caption"] = _captions(file.read(), suffix, caption_key)
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{shard} cannot be read as a shard: {error}") from error
        yield from _whole(sample)


def _split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key of a sample ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _captions(content: bytes, suffix: str, caption_key: str) -> list[str]:
    text = content.decode("utf-8")
    if suffix == "txt":
        return [text.strip()]
    facts = json.loads(text)
    found = facts.get(caption_key)
    if found is None:
        raise ValueError(
            f"a json file in it has no {caption_key!r}; its keys are {', '.join(facts)}: "
            "set caption_column"
        )
    return [found] if isinstance(found, str) else list(found)


def _whole(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a sample that has an image; one without a caption has an empty one."""
    if "offset" in sample:
        row = {name: value for name, value in sample.items() if name != "key"}
        yield {"caption": [""], **row}


class ShardImages:
    """Images in tar shards.

    Args:
        index: Columns as in ``INDEX_FEATURES``.
        shards: The tar files.
    """

    def __init__(self, index: datasets.Dataset, shards: Sequence[Path]) -> None:
        self._index = index
        self._paths = [str(shard) for shard in shards]
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        # In memory: looking one value up in an Arrow table takes longer than reading a kilobyte.
        self.shards: NDArray[np.int64] = index.data.column("shard").to_numpy().astype(np.int64)
        self._offsets = index.data.column("offset").to_numpy()
        self._sizes = index.data.column("size").to_numpy()

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and names behind; after a fork they are shared.

        (Reads have no position.)
        """
        kept = {key: value for key, value in self.__dict__.items() if key != "_names"}
        return {**kept, "_open": OrderedDict()}

    def read(self, row: int) -> StoredImage:
        """Read one, not decoded."""
        shard, start, size = (int(a[row]) for a in (self.shards, self._offsets, self._sizes))
        content = os.pread(self._file(shard).fileno(), size, start)
        return StoredImage(path=f"{self._paths[shard]}/{self.name(row)}", bytes=content)

    def name(self, row: int) -> str:
        """The file's name in its shard."""
        name: str = self._names[row].as_py()
        return name

    @cached_property
    def _names(self) -> pa.ChunkedArray:
        return self._index.data.column("name")

    def facts(self) -> list[pa.ChunkedArray]:
        """Names and sizes."""
        return [self._index.data.column("name"), self._index.data.column("size")]

    def _file(self, shard: int) -> FileIO:
        file = self._open.get(shard)
        if file is None:
            file = self._open[shard] = open(self._paths[shard], "rb", buffering=0)  # noqa: SIM115
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return file
