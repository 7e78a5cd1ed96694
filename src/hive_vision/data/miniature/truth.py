"""Where the miniature's objects are, and which words of a caption name them."""

import json
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


def read_named_objects(captions: Path, masks: Path, name: str) -> list[NamedObject]:
    """Read one scene's objects.

    Args:
        captions: A split's folder with ``metadata.jsonl``.
        masks: The folder with the same split's masks.
        name: The image's file name.

    Raises:
        ValueError: If there is no such scene, or no mask of it.
    """
    path = masks / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder with masks of the same images")
    with Image.open(path) as stored:
        mask = np.asarray(stored)
    for line in (captions / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["file_name"] == name:
            return [
                NamedObject((thing["words"][0], thing["words"][1]), mask == number)
                for number, thing in enumerate(record["objects"], start=1)
            ]
    raise ValueError(f"{captions / 'metadata.jsonl'} has no scene {name!r}")
