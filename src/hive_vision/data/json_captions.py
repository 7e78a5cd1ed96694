"""Captions in one json file beside a folder of images: LLaVA's and COCO's."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets

FEATURES = datasets.Features(
    {
        "image": datasets.Value("string"),
        "caption": datasets.List(datasets.Value("string")),
    }
)
_FORMAT = 2  # change it with what is read: results are cached on users' disks


def read_json_captions(path: Path, kind: Literal["llava", "coco"]) -> datasets.Dataset:
    """Read image names and captions; cached until the file changes.

    Args:
        path: The json file.
        kind: ``llava``: a list of samples with ``image`` and ``conversations``, whose first
            answer is the caption. ``coco``: ``images`` and ``annotations``, several for an image.

    Returns:
        Columns ``image`` (path below the image folder) and ``caption`` (a list), each image once.

    Raises:
        ValueError: If the file is missing or not of this kind.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file; format {kind} needs a json file")
    state = os.stat(path)
    facts = (_FORMAT, os.path.abspath(path), kind, state.st_size, state.st_mtime_ns)
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=FEATURES,
            gen_kwargs={"path": os.path.abspath(path), "kind": kind},
            fingerprint=datasets.fingerprint.Hasher.hash(facts),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(" ".join(str(reason).split())) from error


def _rows(path: str, kind: str) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(Path(path).read_bytes())
        captions = _llava(content) if kind == "llava" else _coco(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        expected = (
            'a list of {"image": ..., "conversations": [{"from": "human", ...}, ...]}'
            if kind == "llava"
            else 'a mapping with "images" (id, file_name) and "annotations" (image_id, caption)'
        )
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path!r} is not {kind} json, {expected} ({reason})") from error
    if not captions:
        raise ValueError(f"{path!r} names no images")
    for image, texts in captions.items():
        yield {"image": image, "caption": texts}


def _llava(content: Any) -> dict[str, list[str]]:
    """Samples without an image are text only and left out."""
    captions: dict[str, list[str]] = {}
    for sample in content:
        if sample.get("image"):
            turns = sample["conversations"]
            answers = (turn["value"] for turn in turns if turn["from"] == "gpt")
            captions.setdefault(sample["image"], []).append(next(answers, ""))
    return captions


def _coco(content: Any) -> dict[str, list[str]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        if annotation["image_id"] in names:  # others belong to images that were left out
            captions[names[annotation["image_id"]]].append((annotation["caption"] or "").strip())
    return captions
