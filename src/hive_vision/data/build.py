"""Captioned images of any source, written as shards that start fast and are read in place.

Shard k holds the images of a fixed range of rows, so its bytes do not depend on the number of
processes. Each is written aside, renamed, and then recorded; after an interruption the same call
writes only what has no record. All lies in a hidden folder beside the output until it is whole.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hive_vision.data.images import StoredImage, UnusableImageError, decode_image, read_bytes
from hive_vision.data.parallel import processors, row_ranges, work_through
from hive_vision.data.quarantine import write_quarantine
from hive_vision.data.shards import INDEX, INDEX_FEATURES
from hive_vision.data.sources import CaptionSource
from hive_vision.folders import (
    acquire,
    hash_file,
    partial_folder,
    put_in_place,
    read_json,
    read_manifest,
    seal,
    write_json,
)

logger = logging.getLogger(__name__)

KIND = "data"
QUARANTINE = "quarantine.jsonl"
FEATURES = datasets.Features(
    {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
)
# What the file of an image is called. Other formats are stored as PNG: same pixels, read by all.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
JPEG_QUALITY = 95
ROWS_TOGETHER = 100  # images in a batch of an Arrow file, in a row group of a parquet file
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class BuildSettings:
    """How a set is written.

    Args:
        to: tar (WebDataset shards, read in place), arrow (a folder for datasets.load_from_disk)
            or parquet (a folder for datasets.load_dataset).
        resize: Shorter side in pixels that larger images get, keeping their shape. Images that
            are not larger, and all if null, keep their bytes.
        shard_size: Images in each shard.
        workers: Processes; one for each processor if null.
    """

    to: Literal["tar", "arrow", "parquet"] = "tar"
    resize: int | None = None
    shard_size: int = 1000
    workers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        for name in ("resize", "shard_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class BuiltImage:
    """An image as it is written.

    Attributes:
        row: Its row in the source.
        name: What the source calls it.
        content: Encoded bytes.
        suffix: Of its file: jpg, png or webp.
        captions: Its texts.
    """

    row: int
    name: str
    content: bytes
    suffix: str
    captions: list[str]


def build_data(source: CaptionSource, output: Path, settings: BuildSettings) -> dict[str, Any]:
    """Write a source as shards.

    Args:
        source: Images with their captions.
        output: Folder to make.
        settings: How.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: If the folder holds something else, or was begun with other settings.
    """
    chosen = {key: value for key, value in asdict(settings).items() if key != "workers"}
    chosen["source_fingerprint"] = source.fingerprint
    records = output.with_name(f".{output.name}.records")
    records.mkdir(parents=True, exist_ok=True)
    busy = f"another process is building {str(output)!r}; wait for it or stop it first"
    with acquire(records / "lock", busy):
        return _build(source, output, records, settings, chosen)


def _build(
    source: CaptionSource,
    output: Path,
    records: Path,
    settings: BuildSettings,
    chosen: dict[str, Any],
) -> dict[str, Any]:
    if output.exists():
        shutil.rmtree(records)
        manifest = read_manifest(output, KIND)
        _check_settings(chosen, manifest, f"{output} was built")
        logger.info("%s is already built; nothing to do", output)
        if manifest["unusable"]:
            logger.info(
                "%d captions were left out then; if their images were repaired, delete %s to "
                "build it again",
                *(manifest["unusable"], output),
            )
        return manifest
    begun = read_json(records / "settings.json")
    if begun is not None:
        _check_settings(chosen, begun, f"{output} was begun")
    aside = partial_folder(output)
    aside.mkdir(parents=True, exist_ok=True)
    if begun is None:
        write_json(records / "settings.json", chosen)
    for path in aside.rglob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)

    ranges = row_ranges(len(source), settings.shard_size)
    writer = ShardWriter(source, settings, aside, records, len(ranges))
    missing = [rows for rows in ranges if not writer.is_written(rows)]
    if len(missing) < len(ranges):
        logger.info("%d of %d shards are already written", len(ranges) - len(missing), len(ranges))
    workers = settings.workers or processors()
    for _ in work_through(writer, missing, workers, f"building {output.name}"):
        pass
    manifest = _finish(writer, ranges, chosen)
    put_in_place(aside, output)
    shutil.rmtree(records)
    return manifest


def _check_settings(chosen: dict[str, Any], found: dict[str, Any], what: str) -> None:
    for key, value in chosen.items():
        if found.get(key) != value:
            if key == "source_fingerprint":
                raise ValueError(f"{what} from other data; delete it or choose another folder")
            raise ValueError(
                f"{what} with {key}={json.dumps(found.get(key)).strip(chr(34))}, "
                f"not {key}={value}: give the same, delete it, or choose another folder"
            )


def _finish(writer: "ShardWriter", ranges: list[range], chosen: dict[str, Any]) -> dict[str, Any]:
    """Write what stands beside the shards, then the manifest."""
    source, folder = writer.source, writer.folder
    # Without the indices: millions of captions are not held at once.
    records = [{**writer.record(rows), "index": None} for rows in ranges]
    images, captions = (sum(record[key] for record in records) for key in ("images", "captions"))
    unusable = [{"source": source.name, **line} for r in records for line in r["unusable"]]
    shards = {record["file"]: record["sha256"] for record in records}
    content = hashlib.sha256("".join(shards.values()).encode())
    write_quarantine(folder / QUARANTINE, source.fingerprint, len(source.captions), unusable)
    if images == 0:
        raise ValueError(f"none of the {len(source)} images of {source.name!r} can be read")
    match writer.settings.to:
        case "tar":
            _write_index(writer, ranges)
        case "arrow":
            _describe_arrow(folder, list(shards), content.hexdigest())
        case "parquet":
            pass  # the names of the files say enough
    logger.info("checking what was written")
    manifest = seal(
        folder,
        KIND,
        source=source.name,
        **chosen,
        fingerprint=content.hexdigest(),
        images=images,
        captions=captions,
        unusable=len(unusable),
        shards=list(shards),
    )
    for name, expected in shards.items():
        if manifest["files"][name]["sha256"] != expected:
            writer.forget(name)
            raise ValueError(f"{name} changed after it was written; run the same command again")
    return manifest


def _write_index(writer: "ShardWriter", ranges: list[range]) -> None:
    """Write where each image lies, shard by shard, as an Arrow file for `Dataset.from_file`."""
    schema = INDEX_FEATURES.arrow_schema
    with (
        pa.OSFile(str(writer.folder / INDEX), "wb") as file,
        pa.ipc.new_stream(file, schema) as stream,
    ):
        for number, rows in enumerate(ranges):
            entries = [{"shard": number, **entry} for entry in writer.record(rows)["index"]]
            columns = {name: [entry[name] for entry in entries] for name in schema.names}
            stream.write_batch(pa.RecordBatch.from_pydict(columns, schema))


def _describe_arrow(folder: Path, names: list[str], fingerprint: str) -> None:
    """Write the two files that `datasets.load_from_disk` expects beside the shards."""
    datasets.DatasetInfo(features=FEATURES).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)


@dataclass(frozen=True, eq=False)
class ShardWriter:
    """Writes one shard for a range of rows; called in several processes.

    Args:
        source: Where the images come from.
        settings: How they are written.
        folder: Where the shards go.
        records: Where it is noted that a shard is finished, and what is in it.
        count: Number of shards, part of their names.
    """

    source: CaptionSource
    settings: BuildSettings
    folder: Path
    records: Path
    count: int

    def __call__(self, rows: range) -> None:
        """Write a shard and its record."""
        path = self.folder / self.file_name(rows)
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
        unusable: list[dict[str, Any]] = []
        written = _Counted(self._images(rows, unusable))
        with aside.open("wb") as file:
            if self.settings.to == "tar":
                index = _write_tar(file, written)
            else:
                index = _write_table(file, written, self.settings.to)
            file.flush()
            os.fsync(file.fileno())
        digest = hash_file(aside)
        os.replace(aside, path)
        record = {
            "file": str(path.relative_to(self.folder)),
            "bytes": path.stat().st_size,
            "sha256": digest,
            "images": written.images,
            "captions": written.captions,
            "unusable": unusable,
            "index": index,
        }
        write_json(self._record_path(rows), record)

    def file_name(self, rows: range) -> str:
        """Name of the shard below the folder, as its readers expect it."""
        number, last = rows.start // self.settings.shard_size, self.count
        match self.settings.to:
            case "tar":
                return f"shard-{number:05}.tar"
            case "arrow":
                return f"data-{number:05}-of-{last:05}.arrow"
            case "parquet":
                return f"data/train-{number:05}-of-{last:05}.parquet"

    def is_written(self, rows: range) -> bool:
        """Whether a shard is recorded and there."""
        record = read_json(self._record_path(rows))
        path = self.folder / self.file_name(rows)
        return record is not None and path.is_file() and path.stat().st_size == record["bytes"]

    def record(self, rows: range) -> dict[str, Any]:
        """Read what is in a finished shard."""
        record = read_json(self._record_path(rows))
        assert record is not None
        return record

    def forget(self, file_name: str) -> None:
        """Have a shard written again by the next call."""
        (self.folder / file_name).unlink()

    def _record_path(self, rows: range) -> Path:
        return self.records / f"{rows.start // self.settings.shard_size:05}.json"

    def _images(self, rows: range, unusable: list[dict[str, Any]]) -> Iterator[BuiltImage]:
        """Read, check and resize; what cannot be used goes to ``unusable``."""
        for row in rows:
            name = self.source.image_name(row)
            try:
                captions = self.source.captions_of(row)
                if not captions:
                    raise UnusableImageError("no caption")
                content, suffix = _prepare(self.source.read_image(row), self.settings.resize)
            except UnusableImageError as error:
                unusable.append({"row": row, "image": name, "caption": None, "reason": str(error)})
                continue
            yield BuiltImage(row, name, content, suffix, captions)


class _Counted:
    """Counts what passes through."""

    def __init__(self, images: Iterator[BuiltImage]) -> None:
        self._from = images
        self.images = self.captions = 0

    def __iter__(self) -> Iterator[BuiltImage]:
        for image in self._from:
            self.images += 1
            self.captions += len(image.captions)
            yield image


def _prepare(stored: StoredImage, resize: int | None) -> tuple[bytes, str]:
    """Give the bytes to write, and the suffix that says what they are."""
    content = read_bytes(stored)
    image = decode_image(StoredImage(path=stored["path"], bytes=content))
    with Image.open(io.BytesIO(content)) as header:
        suffix = SUFFIXES.get(header.format or "")
    shorter = min(image.size)
    if resize is not None and shorter > resize:
        width, height = (max(1, round(side * resize / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    elif suffix is not None:
        return content, suffix
    file = io.BytesIO()
    if suffix in ("jpg", "webp"):  # photographs
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return file.getvalue(), "jpg"
    image.save(file, "PNG")
    return file.getvalue(), "png"


def _write_tar(file: BinaryIO, images: Iterable[BuiltImage]) -> list[dict[str, Any]]:
    """Write ``KEY.jpg`` and ``KEY.json`` (caption, name) for each image; says where it lies."""
    index = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            key = f"{image.row:09}"
            texts = {"caption": image.captions, "name": image.name}
            _add_to_tar(tar, f"{key}.{image.suffix}", image.content)
            padded = -(-len(image.content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            index.append(
                {
                    "offset": file.tell() - padded,
                    "size": len(image.content),
                    "name": image.name,
                    "caption": image.captions,
                }
            )
            _add_to_tar(tar, f"{key}.json", json.dumps(texts, ensure_ascii=False).encode())
    return index


def _add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same bytes everywhere
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_table(file: BinaryIO, images: Iterable[BuiltImage], to: str) -> list[dict[str, Any]]:
    """Write columns ``image`` (embedded) and ``caption`` (a list), some rows at a time."""
    schema = FEATURES.arrow_schema
    writer = pa.ipc.new_stream(file, schema) if to == "arrow" else pq.ParquetWriter(file, schema)
    with writer:
        rows: list[dict[str, Any]] = []
        for image in images:
            stored = {"bytes": image.content, "path": image.name}
            rows.append({"image": stored, "caption": image.captions})
            if len(rows) == ROWS_TOGETHER:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    return []
