"""Where the miniature's objects are, and which words of a caption name them."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class NamedObject:
    """An object of a scene.

    Attributes:
        words: Characters ``[start, stop)`` of the caption.
        mask: (H, W) its visible pixels.
    """

    words: tuple[int, int]
    mask: NDArray[np.bool_]


def read_named_objects(
    captions: Path, masks: Path, names: Collection[str]
) -> dict[str, list[NamedObject]]:
    """Read the objects of scenes.

    Args:
        captions: A split's folder with ``metadata.jsonl``.
        masks: The folder with the same split's masks.
        names: The images' file names.

    Returns:
        Name -> the scene's objects.

    Raises:
        ValueError: If a scene or its mask is not there.
    """
    metadata = captions / "metadata.jsonl"
    if not metadata.is_file():
        raise ValueError(
            f"masks needs the folder of one split with its metadata.jsonl as data; got "
            f"{str(captions)!r}"
        )
    found: dict[str, list[NamedObject]] = {}
    for line in metadata.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = record["file_name"]
        if name not in names:
            continue
        path = masks / name
        if "objects" not in record or not path.is_file():
            raise ValueError(
                f"{path if 'objects' in record else metadata} does not say where the objects of "
                f"{name!r} are; give data and masks of the same split of a miniature"
            )
        with Image.open(path) as stored:
            mask = np.asarray(stored)
        if mask.ndim != 2:
            raise ValueError(f"{path} is an image, not a mask; give masks=FOLDER of a miniature")
        found[name] = []
        for number, thing in enumerate(record["objects"], start=1):
            if list(_box(mask == number)) != thing["box"]:
                raise ValueError(
                    f"{path} is the mask of another image; give data and masks of the same split"
                )
            found[name].append(NamedObject((thing["words"][0], thing["words"][1]), mask == number))
    missing = sorted(set(names) - found.keys())
    if missing:
        raise ValueError(f"{metadata} has no scene {missing[0]!r}; give data of a miniature")
    return found


def _box(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """Tight box (x0, y0, x1, y1), x1 and y1 exclusive; empty of an empty mask."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return ()
    ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return tuple(int(end) for end in ends)
