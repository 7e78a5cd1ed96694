"""Labelled images in memory, and encoders with a cache of their own."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hive_vision.data.classification import ClassificationSet, LabelledImages
from hive_vision.data.images import ColumnImages


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def from_bytes(contents: Sequence[bytes], labels: Any, name: str = "noise") -> LabelledImages:
    rows = [{"bytes": content, "path": None} for content in contents]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    return LabelledImages(name, ColumnImages(data, "image", name), np.asarray(labels, np.int64))


def noise(count: int, seed: int = 0, shape: tuple[int, int] = (40, 30)) -> LabelledImages:
    """Random pixels of two classes in turn."""
    random = np.random.default_rng(seed)
    contents = [encoded(random.integers(0, 256, (*shape, 3), np.uint8)) for _ in range(count)]
    return from_bytes(contents, np.arange(count) % 2)


def coloured(count: int, seed: int, name: str = "colours", spread: float = 60) -> LabelledImages:
    """Noise around one colour for each of three classes."""
    random = np.random.default_rng(seed)
    centres = np.array([[176, 80, 80], [80, 176, 80], [80, 80, 176]])
    labels = np.arange(count) % 3
    pixels = centres[labels][:, None, None] + random.normal(0, spread, (count, 32, 32, 3))
    shades = random.normal(0, spread / 2, (count, 1, 1, 3))
    contents = [encoded(image) for image in np.clip(pixels + shades, 0, 255).astype(np.uint8)]
    return from_bytes(contents, labels, name)


def colour_set(train: int, test: int, spread: float = 60) -> ClassificationSet:
    return ClassificationSet(
        "colours",
        coloured(train, 1, "colours train", spread),
        coloured(test, 2, "colours test", spread),
        3,
        settings={"source": "memory"},
    )


def write_colours(folder: Path, train: int = 30, test: int = 24) -> Path:
    """The colours as parquet files with class names."""
    folder.mkdir(parents=True)
    names = datasets.ClassLabel(names=["red", "green", "blue"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        images = coloured(count, seed)
        rows = {
            "image": [images.images.read(row) for row in range(count)],
            "label": images.labels.tolist(),
        }
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(folder / f"{split}.parquet")
    return folder
