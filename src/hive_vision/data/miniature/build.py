"""Write the miniature to disk in the formats that real data comes in."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image

from hive_vision.data.miniature.questions import Questioner
from hive_vision.data.miniature.scenes import (
    COLOURS,
    DIGITS,
    KINDS,
    SHAPES,
    TEXTURES,
    DigitScans,
    Look,
    Scene,
    draw_scene,
    random_look,
    split_digit_scans,
)
from hive_vision.data.miniature.wording import Caption, write_caption, write_coarse_caption
from hive_vision.folders import written_aside

logger = logging.getLogger(__name__)

# The classification sets, from coarse to fine, and what each class fixes of an object's look.
# What a class does not fix is drawn at random, so that it cannot help.
CLASSIFICATION_SETS: dict[str, dict[str, dict[str, str]]] = {
    "kind": {kind: {"kind": kind} for kind in KINDS},
    "colour": {colour: {"colour": colour} for colour in COLOURS},
    "shape": {shape: {"kind": "shape", "name": shape} for shape in SHAPES},
    "texture": {texture: {"kind": "shape", "texture": texture} for texture in TEXTURES},
    "digit": {digit: {"kind": "digit", "name": digit} for digit in DIGITS},
    "shape_texture": {
        f"{texture} {shape}": {"kind": "shape", "name": shape, "texture": texture}
        for shape in SHAPES
        for texture in TEXTURES
    },
}

_SMALLEST_IMAGE = 24
# First numbers of the seed sequences: every part of the data has random numbers of its own, so
# that changing the size of one part changes no other. (0 is the split of the digit scans.)
_STREAMS = {"train": 1, "validation": 2, "questions": 3, "classification": 4}


@dataclass(frozen=True)
class MiniatureData:
    """What the miniature's data consists of.

    Args:
        seed: the data is a function of it: same seed, same bytes.
        train_scenes: captioned scenes to train on; each also has a training question.
        validation_scenes: captioned held-out scenes; each also has two test questions.
        classification_train: training images in each classification set.
        classification_test: test images in each classification set.
        image_size: side of the images in pixels, at least 24.
    """

    seed: int = 0
    train_scenes: int = 8000
    validation_scenes: int = 512
    classification_train: int = 1500
    classification_test: int = 600
    image_size: int = 48

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be drawn."""
        if self.image_size < _SMALLEST_IMAGE:
            raise ValueError(
                f"image_size is {self.image_size}, but the miniature's objects are recognisable "
                f"from {_SMALLEST_IMAGE} pixels on: use 48, or at least {_SMALLEST_IMAGE}"
            )
        for name, count in asdict(self).items():
            if name != "seed" and count < 1:
                raise ValueError(f"{name} is {count}: give a number of at least 1")


def build_miniature_data(folder: Path, settings: MiniatureData) -> None:
    """Draw the miniature's data and write it.

    The layout under `folder`:

    - `captions/{train,validation}`: images and `metadata.jsonl` (file_name, caption,
      coarse_caption, objects), an image folder as the datasets library reads it;
    - `masks/{train,validation}`: a PNG a scene, 0 for background and k for the k-th object;
    - `questions/{train,test}.parquet`: image, question, answer, type;
    - `classification/<set>/{train,test}.parquet`: image, label; single objects.

    Scans of digits in validation scenes and test sets appear in no training image.

    Args:
        folder: the folder to make.
        settings: what to draw.

    Raises:
        ValueError: if `folder` exists.
    """
    with written_aside(folder) as aside:
        train_scans, held_out_scans = split_digit_scans(settings.seed)
        scenes = (("train", train_scans, 1), ("validation", held_out_scans, 2))
        for split, scans, questions in scenes:
            count = settings.train_scenes if split == "train" else settings.validation_scenes
            _write_scenes(aside, split, settings, scans, count, questions)
        for number, (name, classes) in enumerate(CLASSIFICATION_SETS.items()):
            target = aside / "classification" / name
            target.mkdir(parents=True)
            for test, scans in enumerate((train_scans, held_out_scans)):
                count = settings.classification_test if test else settings.classification_train
                path = target / ("test.parquet" if test else "train.parquet")
                seed = [settings.seed, _STREAMS["classification"], number, test]
                _write_classification(path, seed, classes, scans, count, settings.image_size)
    logger.info("wrote the miniature's data to %s", folder)


def _write_scenes(
    root: Path,
    split: str,
    settings: MiniatureData,
    scans: DigitScans,
    count: int,
    questions_each: int,
) -> None:
    """Write a split's captioned scenes with their masks, and the questions about them."""
    images, masks = root / "captions" / split, root / "masks" / split
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    (root / "questions").mkdir(exist_ok=True)
    questioner = Questioner(np.random.default_rng([settings.seed, _STREAMS["questions"], count]))
    rows: list[dict[str, Any]] = []
    with (images / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index in range(count):
            rng = np.random.default_rng([settings.seed, _STREAMS[split], index])
            looks = _several_looks(rng, scans)
            scene = draw_scene(rng, looks, scans, settings.image_size)
            name = f"{index:06d}.png"
            png = _png(scene.image)
            (images / name).write_bytes(png)
            (masks / name).write_bytes(_png(scene.mask))
            caption = write_caption(rng, scene)
            record = {
                "file_name": name,
                "caption": caption.text,
                "coarse_caption": write_coarse_caption(rng, scene),
                "objects": _objects(scene, caption),
            }
            metadata.write(json.dumps(record) + "\n")
            for _ in range(questions_each):
                question = questioner.ask(scene.things)
                rows.append(
                    {
                        "image": {"bytes": png, "path": name},
                        "question": question.text,
                        "answer": question.answer,
                        "type": question.type,
                    }
                )
    features = Features(
        {
            "image": ImageFeature(),
            "question": Value("string"),
            "answer": Value("string"),
            "type": Value("string"),
        }
    )
    part = "train" if split == "train" else "test"
    _write_parquet(root / "questions" / f"{part}.parquet", rows, features)


def _several_looks(rng: np.random.Generator, scans: DigitScans) -> list[Look]:
    count = 1 + int(np.searchsorted((0.45, 0.85), rng.random()))
    return [random_look(rng, scans) for _ in range(count)]


def _objects(scene: Scene, caption: Caption) -> list[dict[str, Any]]:
    return [
        {**vars(thing), "words": span}
        for thing, span in zip(scene.things, caption.spans, strict=True)
    ]


def _write_classification(
    path: Path,
    seed: Sequence[int],
    classes: dict[str, dict[str, str]],
    scans: DigitScans,
    count: int,
    image_size: int,
) -> None:
    """Write single-object scenes with as many of each class as of any other, give or take one."""
    names = list(classes)
    labels = np.random.default_rng([*seed, 0]).permutation(np.arange(count) % len(names))
    rows = []
    for index, label in enumerate(labels.tolist()):
        rng = np.random.default_rng([*seed, 1, index])
        look = random_look(rng, scans, **classes[names[label]])
        png = _png(draw_scene(rng, [look], scans, image_size).image)
        rows.append({"image": {"bytes": png, "path": f"{index:06d}.png"}, "label": label})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    _write_parquet(path, rows, features)


def _write_parquet(path: Path, rows: list[dict[str, Any]], features: Features) -> None:
    # Through the features' own Arrow schema, which is where the datasets library keeps column
    # types such as ClassLabel: `load_dataset("parquet", ...)` then restores them.
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    # Noise hardly compresses (by a fifth), and trying takes longer than drawing the scene.
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0 if pixels.ndim == 3 else 1)
    return buffer.getvalue()
