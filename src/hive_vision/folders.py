"""Folders that are handed on: written aside, sealed with a manifest, renamed into place, checked.

One format for checkpoints, a stage's model, the exported encoder and built data. The manifest
names what the folder is (``kind``), facts about it, and every file with its size and SHA-256.

    with written_aside(path) as aside:      # nobody ever sees half a folder
        model.save_pretrained(aside)
        seal(aside, "model", method="hive")
    facts = check_folder(path, "model")     # the right kind, and every byte as it was written
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
FORMAT = 1
_PARTIAL = ".partial"


class BrokenFolderError(ValueError):
    """A folder whose content is not what its manifest says."""


@contextmanager
def written_aside(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder beside ``folder`` that takes its place if the block ends well.

    What an interrupted write left behind is thrown away first; after an error nothing remains.

    Args:
        folder: The folder to make.
        replace: Take the place of a folder that exists.

    Raises:
        ValueError: If ``folder`` exists and is not to be replaced.
        OSError: If something cannot be written.
    """
    if folder.exists() and not replace:
        raise ValueError(f"{folder} exists already: delete it or choose another folder")
    aside = partial_folder(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except SafetensorError as error:  # a full disk too, which it does not call an OSError
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{folder} could not be written ({error})") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    put_in_place(aside, folder)


def partial_folder(folder: Path) -> Path:
    """Where ``folder`` is written before it is whole: beside it, hidden."""
    return folder.with_name(f".{folder.name}{_PARTIAL}")


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename a finished folder over an older one, durable before the name changes."""
    for path in sorted(aside.rglob("*")):
        _sync(path)
    _sync(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    _sync(folder.parent)


def seal(folder: Path, kind: str, **facts: Any) -> dict[str, Any]:
    """Write the manifest of a folder whose files are all there.

    Args:
        folder: The folder.
        kind: What it is, e.g. ``checkpoint``, ``model``, ``encoder``, ``data``.
        **facts: What a reader of the folder needs to know, as JSON.

    Returns:
        The manifest.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    manifest = {"format": FORMAT, "kind": kind, **facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder's manifest.

    Args:
        folder: The folder.
        kind: What it has to be.

    Raises:
        BrokenFolderError: If there is no manifest, or one that cannot be read.
        ValueError: If the folder is of another kind or of a newer format.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise BrokenFolderError(f"{path} cannot be read ({error})") from error
    if manifest is None:
        raise BrokenFolderError(f"{folder} has no {MANIFEST}; expected a {kind} folder")
    if manifest.get("kind") != kind:
        raise ValueError(f"{folder} is a {manifest.get('kind')} folder; expected a {kind} folder")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has manifest format {manifest.get('format')}; this version reads {FORMAT}"
        )
    return manifest


def check_folder(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder's manifest and compare every file with it.

    Returns:
        The manifest.

    Raises:
        BrokenFolderError: If a file is missing, has another size or other bytes.
        ValueError: If the folder is of another kind.
    """
    manifest = read_manifest(folder, kind)
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BrokenFolderError(f"{path} is missing")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise BrokenFolderError(f"{path} has {size} bytes; {wanted['bytes']} were written")
        if hash_file(path) != wanted["sha256"]:
            raise BrokenFolderError(f"{path} has other bytes than were written")
    return manifest


def check_keys(expected: Iterable[str], found: Iterable[str], where: object) -> None:
    """Compare the keys that a model expects with those found; strict, both ways.

    Raises:
        ValueError: Names expected and found keys.
    """
    expected, found = set(expected), set(found)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise ValueError(
            f"{where} has other weights than the model: {len(missing)} expected keys are missing "
            f"({_some(missing)}), {len(unexpected)} found keys are unexpected ({_some(unexpected)})"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def acquire(lock: Path, busy: str) -> IO[str]:
    """Keep other processes out until the returned file is closed or this process ends.

    Args:
        lock: A file that exists for this only.
        busy: What to say if another process holds it.

    Raises:
        ValueError: If another process holds it.
    """
    file = lock.open("w")
    try:
        # Belongs to this process alone: neither its children nor a killed process keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(busy) from error
    return file


def hash_file(path: Path) -> str:
    """Give the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; ``None`` if there is none."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = path.with_name(path.name + _PARTIAL)
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn ``{"data": {"seed": 0}}`` into ``{"data.seed": 0}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
