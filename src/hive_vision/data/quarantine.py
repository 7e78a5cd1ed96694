"""Samples that are known to be unusable, and left out before the order is made.

A file of JSON lines, written by ``hive-vision data verify``. The first line says which data it
is about; each other line names a sample, the whole image if ``caption`` is null::

    {"fingerprint": "5f0c...", "samples": 20000}
    {"source": "photos", "row": 17, "image": "0017.jpg", "caption": null, "reason": "no image"}
    {"source": "photos", "row": 21, "image": "0021.jpg", "caption": 0, "reason": "empty caption"}
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hive_vision.data.sources import CaptionSource
from hive_vision.folders import write_text

_CAPTIONS = 2**20  # more than any image has


def read_quarantine(path: str | Path, fingerprint: str) -> dict[str, list[dict[str, Any]]]:
    """Read a quarantine file.

    Args:
        path: The file.
        fingerprint: Of the data that it has to be about.

    Returns:
        Its lines by source.

    Raises:
        ValueError: If there is no such file, it is damaged, or about other data.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"quarantine {str(path)!r} is no file; hive-vision data verify writes it, or set "
            "data.quarantine to null"
        )
    entries: dict[str, list[dict[str, Any]]] = {}
    try:
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        about = json.loads(first)["fingerprint"]
        for line in lines:
            entry = json.loads(line)
            chosen = {"row": int(entry["row"]), "caption": entry["caption"]}
            entries.setdefault(entry["source"], []).append(chosen)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"quarantine {str(path)!r} is damaged ({type(error).__name__}: {error}); write it "
            "again with hive-vision data verify"
        ) from error
    if about != fingerprint:
        raise ValueError(
            f"quarantine {str(path)!r} is about other data (fingerprint {str(about)[:12]}, these "
            f"have {fingerprint[:12]}); write it again with hive-vision data verify"
        )
    return entries


def write_quarantine(
    path: str | Path, fingerprint: str, samples: int, entries: Iterable[Mapping[str, Any]]
) -> None:
    """Write a quarantine file.

    Args:
        path: The file.
        fingerprint: Of the data that it is about.
        samples: Pairs of the data.
        entries: ``source``, ``row``, ``image``, ``caption`` and ``reason`` of each sample.
    """
    lines = [{"fingerprint": fingerprint, "samples": samples}, *entries]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(Path(path), text)


def usable_pairs(
    source: CaptionSource, quarantine: Mapping[str, list[dict[str, Any]]]
) -> NDArray[np.bool_]:
    """Say which of a source's P pairs are not in quarantine.

    Args:
        source: A whole source or a part of it.
        quarantine: What `read_quarantine` gave.

    Returns:
        (P,) true where the pair can be used.
    """
    entries = quarantine.get(source.name, [])
    images = [entry["row"] for entry in entries if entry["caption"] is None]
    captions = [
        entry["row"] * _CAPTIONS + entry["caption"]
        for entry in entries
        if entry["caption"] is not None
    ]
    rows = source.rows[source.image_rows]
    first = np.searchsorted(source.image_rows, source.image_rows)
    pairs = rows * _CAPTIONS + np.arange(len(rows)) - first
    usable: NDArray[np.bool_] = ~(np.isin(rows, images) | np.isin(pairs, captions))
    return usable
