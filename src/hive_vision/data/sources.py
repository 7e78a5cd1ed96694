"""Captioned images in the formats people have: one view of all of them.

A source has N images and P pairs (image, caption); P > N where images have several captions.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hive_vision.data.images import ColumnImages, ImageStore, StoredImage, holds_images
from hive_vision.data.json_captions import read_json_captions
from hive_vision.data.shards import INDEX, SHARD_SPAN, ShardImages, find_shards, index_shards
from hive_vision.folders import MANIFEST, read_json

Format = Literal["auto", "imagefolder", "llava", "coco", "datasets", "shards"]
PARQUET = b"PAR1"  # how such a file starts
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.tar)")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Source:
    """One set of captioned images.

    Args:
        path: Folder, file, or hub id.
        images: Folder with the images of llava and coco; the json file's own folder if null.
        format: imagefolder, llava, coco, datasets or shards; auto looks at the content.
        split: Split to take; train, or the only one, if null.
        image_column: Column with the images.
        caption_column: Column with the captions: a text, or a list of texts.
        weight: Passes over this source in each epoch of a mixture.
    """

    path: str
    images: str | None = None
    format: Format = "auto"
    split: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no source can have."""
        if not self.weight > 0:
            raise ValueError(f"weight of {self.path!r} is {self.weight}; it must be above 0")


@dataclass(frozen=True, eq=False)
class CaptionSource:
    """Images with their captions. Nothing is decoded here; the images stay where they lie.

    Args:
        name: What to call it: its path, and its split unless that is ``train``.
        images: Where the images are read from.
        rows: (N,) the images' rows in the whole source.
        captions: (P,) texts, those of an image one after another.
        image_rows: (P,) which of the N images each caption belongs to, ascending.
        fingerprint: Changes with captions, image names and sizes, and with what was selected.
    """

    name: str
    images: ImageStore
    rows: NDArray[np.int64]
    captions: pa.ChunkedArray
    image_rows: NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def samples(self) -> int:
        """P."""
        return len(self.captions)

    def first(self, count: int) -> "CaptionSource":
        """Keep the first pairs."""
        return self.select_pairs(np.arange(count))

    @property
    def pairs(self) -> datasets.Dataset:
        """P pairs with columns ``image_row`` and ``caption``."""
        table = pa.table({"image_row": self.image_rows, "caption": self.captions})
        return datasets.Dataset(table, fingerprint=self.fingerprint)

    @property
    def shards(self) -> NDArray[np.int64] | None:
        """(N,) shard number of each image, if it is best read shard by shard."""
        shards = self.images.shards
        return None if shards is None else shards[self.rows]

    def read_image(self, row: int) -> StoredImage:
        """Read image ``row``, not decoded: a small object to hand to another process."""
        return self.images.read(int(self.rows[row]))

    def image_name(self, row: int) -> str:
        """Path of image ``row`` below its folder, its key in a shard, or its row."""
        return self.images.name(int(self.rows[row]))

    def captions_of(self, row: int) -> list[str]:
        """All captions of image ``row``; a missing one is an empty text."""
        first, last = np.searchsorted(self.image_rows, (row, row + 1))
        return [self.captions[int(pair)].as_py() or "" for pair in range(first, last)]

    def select_images(self, rows: Iterable[int] | NDArray[np.int64]) -> "CaptionSource":
        """Keep some images, in the order given, with all their captions."""
        chosen = np.fromiter(rows, dtype=np.int64)
        first = np.searchsorted(self.image_rows, chosen)
        counts = np.searchsorted(self.image_rows, chosen, side="right") - first
        image_rows = np.repeat(np.arange(len(chosen)), counts)
        start_of_image = np.cumsum(counts) - counts
        pairs = np.repeat(first - start_of_image, counts) + np.arange(len(image_rows))
        return replace(
            self,
            rows=self.rows[chosen],
            captions=self.captions.take(pa.array(pairs)),
            image_rows=image_rows,
            fingerprint=hash_parts(self.fingerprint.encode(), b"images", chosen.tobytes()),
        )

    def select_pairs(self, pairs: NDArray[np.int64]) -> "CaptionSource":
        """Keep some pairs, given in ascending order; the images keep their rows."""
        return replace(
            self,
            captions=self.captions.take(pa.array(pairs)),
            image_rows=self.image_rows[pairs],
            fingerprint=hash_parts(self.fingerprint.encode(), b"pairs", pairs.tobytes()),
        )


def open_source(source: Source) -> dict[str, CaptionSource]:
    """Open a source without reading its images.

    Returns:
        Its splits by name; only the one asked for, if the source says so.

    Raises:
        ValueError: If nothing is found, or a split or column is missing (those found are named).
    """
    kind = detect_format(source.path) if source.format == "auto" else source.format
    built = _built_fingerprint(source.path)
    if kind == "shards":
        splits = _chosen(find_shards(source.path), source)
        return {
            split: _open_shards(source, split, shards, built) for split, shards in splits.items()
        }
    root = source.images or source.path
    if kind in ("llava", "coco"):
        root = source.images or str(Path(source.path).parent)
        data = read_json_captions(Path(source.path), kind)
        _check_images(data["image"][:20], root, source.path)
        source = replace(source, image_column="image", caption_column="caption")
        splits = _chosen({"train": data}, source)
    else:
        splits = _chosen(load_splits(source.path, kind), source)
    return {
        split: caption_source(data, source, _name(source, split), root, built)
        for split, data in splits.items()
    }


def detect_format(path: str) -> Format:
    """Look at what is there: its content, not its name.

    Raises:
        ValueError: If it is a file of another kind.
    """
    place = Path(path)
    if place.is_file():
        if tarfile.is_tarfile(place):
            return "shards"
        with place.open("rb") as file:
            start = file.read(2**20)
        if start.startswith(PARQUET):
            return "datasets"
        if start.lstrip().startswith(b"["):
            return "llava"
        if start.lstrip().startswith(b"{") and not _is_json_object(start.splitlines()[0]):
            return "coco"
        raise ValueError(
            f"{path!r} is a file; give the folder that holds images and metadata, or a llava or "
            "coco json file, a parquet file or a tar shard"
        )
    if any((place / name).is_file() for name in METADATA_FILES):
        return "imagefolder"
    return "shards" if SHARD_SPAN.search(path) or find_shards(path) else "datasets"


def _is_json_object(line: bytes) -> bool:
    """Whether a line is an object of its own, as in JSON lines, and not COCO's on one line."""
    try:
        return "annotations" not in json.loads(line)
    except ValueError:
        return False


def _chosen(splits: Mapping[str, Any], source: Source) -> dict[str, Any]:
    if source.split is None:
        return dict(splits)
    if source.split not in splits:
        raise ValueError(
            f"{source.path!r} has no split {source.split!r}; its splits: {', '.join(splits)}"
        )
    return {source.split: splits[source.split]}


def _open_shards(
    source: Source, split: str, shards: list[Path], fingerprint: str | None
) -> CaptionSource:
    index_file = shards[0].parent / INDEX
    if fingerprint is not None and index_file.is_file():
        index = datasets.Dataset.from_file(str(index_file))
        if source.caption_column not in index.column_names:
            raise ValueError(f"{source.path!r} was built with captions in column 'caption'")
    else:
        index = index_shards(shards, source.caption_column)
    captions = index.data.column("caption")
    images = ShardImages(index, shards)
    return join_captions(_name(source, split), images, captions, source, fingerprint)


def _built_fingerprint(path: str) -> str | None:
    """What `hive-vision data build` wrote down, so that start-up need not look at all data."""
    try:
        manifest = read_json(Path(path) / MANIFEST)
    except ValueError:
        return None
    built = isinstance(manifest, dict) and manifest.get("kind") == "data"
    return str(manifest["fingerprint"]) if built else None  # type: ignore[index]


def _check_images(names: Iterable[str], root: str, path: str) -> None:
    """Find out early that the image folder is the wrong one."""
    names = list(names)
    if names and not any(os.path.isfile(os.path.join(root, name)) for name in names):
        raise ValueError(
            f"{path!r} names images like {names[0]!r}, which are not in {root!r}: set images to "
            "the folder that these paths start from"
        )


def caption_source(
    data: datasets.Dataset,
    source: Source,
    name: str,
    root: str = "",
    fingerprint: str | None = None,
) -> CaptionSource:
    """Make a source of a table with an image column and a caption column.

    Args:
        data: The table.
        source: Names the columns.
        name: Of the result.
        root: Folder that relative image paths start from.
        fingerprint: If it is known.

    Raises:
        ValueError: If a column is missing or holds something else.
    """
    for key in ("image_column", "caption_column"):
        column = getattr(source, key)
        if column not in data.column_names:
            raise ValueError(
                f"{source.path!r} has no column {column!r}; its columns are "
                f"{', '.join(data.column_names)}: set {key} (data.{key} of a recipe)"
            )
    kind = data.data.column(source.image_column).type
    if not holds_images(kind):
        raise ValueError(
            f"image column {source.image_column!r} of {source.path!r} holds {kind}, not images"
        )
    images = ColumnImages(data, source.image_column, root)
    return join_captions(name, images, data.data.column(source.caption_column), source, fingerprint)


def join_captions(
    name: str,
    images: ImageStore,
    captions: pa.ChunkedArray,
    source: Source,
    fingerprint: str | None = None,
) -> CaptionSource:
    """Join images with one caption, or one list of captions, for each.

    Raises:
        ValueError: If the captions are not text.
    """
    kind = captions.type
    several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    text = kind.value_type if several else kind
    if pa.types.is_null(text):
        text = pa.string()
        captions = captions.cast(pa.list_(text) if several else text)
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise ValueError(
            f"caption column {source.caption_column!r} of {source.path!r} holds {kind}, not text"
        )
    rows = np.arange(len(images))
    image_rows = rows
    if several:
        counts = pc.fill_null(pc.list_value_length(captions), 0).to_numpy()
        image_rows = np.repeat(rows, counts)
        captions = pa.chunked_array([chunk.flatten() for chunk in captions.chunks], text)
    if fingerprint is None:
        fingerprint = hash_parts(
            *(hash_column(column) for column in (captions, *images.facts())),
            image_rows.astype("<i8").tobytes(),
        )
    return CaptionSource(name, images, rows, captions, image_rows, fingerprint)


def load_splits(source: str | Path, kind: Format = "auto") -> datasets.DatasetDict:
    """Load all splits of what the datasets library reads.

    Args:
        source: Folder, parquet file, or hub id.
        kind: imagefolder, datasets, or auto to look.

    Raises:
        ValueError: If there is nothing to load.
    """
    path = Path(source)
    if not path.exists() and not HUB_ID.fullmatch(str(source)):
        raise ValueError(
            f"no images found at {str(source)!r}, it does not exist: give a folder with images and "
            f"one of {', '.join(METADATA_FILES)}, or a hub id"
        )
    if kind == "auto":
        kind = detect_format(str(source))
    try:
        if kind == "imagefolder":
            # All files: else a file named like a split ("train-station.png") would be the only one.
            files = {"train": f"{glob.escape(str(path))}/**"}
            return datasets.load_dataset("imagefolder", data_files=files)
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)})
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path))
            several = isinstance(saved, datasets.DatasetDict)
            return saved if several else datasets.DatasetDict(train=saved)
        return datasets.load_dataset(str(source), cache_dir=_own_cache(path))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no images found at {str(source)!r}: give a folder with images and one of "
            f"{', '.join(METADATA_FILES)}, or a hub id ({reason})"
        ) from error


def _own_cache(folder: Path) -> str | None:
    """Where the datasets library keeps a local folder that has a card; elsewhere it looks itself.

    With a card it goes by the folder's name alone: another folder of that name, or the same one
    with other files, would silently be the old data.
    """
    if not (folder / "README.md").is_file():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return os.path.join(datasets.config.HF_DATASETS_CACHE, hash_parts(repr(facts).encode())[:32])


def choose_split(splits: Any, wanted: str, source: str | Path) -> Any:
    """Take the split that is wanted, or the only one there is.

    Raises:
        ValueError: If there is no such split, or it is empty.
    """
    if wanted not in splits and len(splits) != 1:
        found = ", ".join(splits) or "only validation"
        raise ValueError(f"{str(source)!r} has no split {wanted!r}; its splits: {found}")
    chosen = splits[wanted] if wanted in splits else next(iter(splits.values()))
    if len(chosen) == 0:
        raise ValueError(f"the data set {str(source)!r} is empty")
    return chosen


def combine_fingerprints(*fingerprints: str) -> str:
    """Make one fingerprint of several, which depends on their order."""
    return hash_parts(*(fingerprint.encode() for fingerprint in fingerprints))


def _name(source: Source, split: str) -> str:
    return source.path if split == "train" else f"{source.path}:{split}"


def hash_parts(*parts: bytes) -> str:
    """Make one hash of several byte strings, which depends on where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def hash_column(column: pa.ChunkedArray) -> bytes:
    """Hash texts or numbers whatever chunks they lie in, without making Python objects."""
    sizes, content = hashlib.sha256(), hashlib.sha256()
    for chunk in column.chunks:
        if pa.types.is_integer(chunk.type):
            sizes.update(
                pc.fill_null(chunk, -1).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
            )
            continue
        chunk = pc.fill_null(chunk, "").cast(pa.large_string())
        _, offsets, texts = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        sizes.update(np.diff(ends).astype("<i8").tobytes())
        if texts is not None:
            content.update(memoryview(texts)[ends[0] : ends[-1]])
    return sizes.digest() + content.digest()
