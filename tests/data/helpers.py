"""Small captioned images in every format, and a tokenizer whose ids can be read."""

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hive_vision.data.sources import CaptionSource, Source, caption_source, open_source

START, END = 1, 2


def encode(captions: Sequence[str]) -> list[list[int]]:
    """A word becomes 10 + its number of letters."""
    return [[START, *(10 + len(word) for word in text.split()), END] for text in captions]


def picture(index: int) -> Image.Image:
    """An image that says which one it is, with enough noise to be worth truncating."""
    pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[0, 0] = index
    return Image.fromarray(pixels)


def first_pixel(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def words(index: int) -> str:
    return " ".join(["word"] * (index % 5 + 1))


def good(index: int) -> dict[str, Any]:
    return {"bytes": encoded(picture(index)), "path": None}


def one_line(failure: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(failure.value)
    assert message
    assert "\n" not in message
    return message


def in_memory(
    images: list[dict | None], captions: list[Any], name: str = "memory"
) -> CaptionSource:
    """Images given as bytes and/or path, each with a caption or a list of them."""
    several = any(isinstance(caption, list) for caption in captions)
    text = datasets.Value("string")
    features = {"image": datasets.Image(decode=False), "caption": text}
    if several:
        features["caption"] = datasets.List(text)
    data = datasets.Dataset.from_dict(
        {"image": images, "caption": captions}, features=datasets.Features(features)
    )
    return caption_source(data, Source(name), name)


def train_of(path: Path | str, **keys: Any) -> CaptionSource:
    return open_source(Source(str(path), **keys))["train"]


def write_images(folder: Path, count: int, first: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index:03}.png" for index in range(first, first + count)]
    for index, name in enumerate(names, start=first):
        picture(index).save(folder / name)
    return names


def write_metadata(folder: Path, rows: list[dict], kind: str = "jsonl") -> None:
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


def write_folder(
    folder: Path, count: int, kind: str = "jsonl", column: str = "caption", first: int = 0
) -> Path:
    names = write_images(folder, count, first)
    rows = [{"file_name": name, column: words(i)} for i, name in enumerate(names, start=first)]
    write_metadata(folder, rows, kind)
    return folder


def llava_sample(name: str, caption: str) -> dict[str, Any]:
    turns = [("human", "Describe it.\n<image>"), ("gpt", caption), ("human", "?"), ("gpt", "no")]
    conversations = [{"from": who, "value": text} for who, text in turns]
    return {"id": name, "image": name, "conversations": conversations}


def write_llava(path: Path, names: Sequence[str], captions: Sequence[str]) -> Path:
    samples = [llava_sample(name, text) for name, text in zip(names, captions, strict=True)]
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def write_coco(path: Path, names: Sequence[str], captions: Sequence[Sequence[str]]) -> Path:
    """Ids that are no positions, and annotations that are not in the order of the images."""
    images = [{"id": 7 * i + 3, "file_name": name} for i, name in enumerate(names)]
    annotations = [
        {"image_id": image["id"], "id": 1000 + image["id"], "caption": texts[number]}
        for number in range(max(len(texts) for texts in captions))
        for image, texts in reversed(list(zip(images, captions, strict=True)))
        if number < len(texts)
    ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(
    folder: Path, captions: Sequence[Any], per_shard: int = 5, form: str = "json"
) -> Path:
    """Pictures 0, 1, ... with a caption in KEY.txt, or a caption or list of them in KEY.json."""
    for start in range(0, len(captions), per_shard):
        members = []
        for index, caption in enumerate(captions[start : start + per_shard], start):
            content = caption if form == "txt" else json.dumps({"caption": caption})
            members.append((f"{index:03}.png", encoded(picture(index))))
            members.append((f"{index:03}.{form}", content.encode()))
        write_shard(folder / f"part-{start // per_shard:05}.tar", members)
    return folder


def images_with_captions(
    folder: Path, images: int, each: int, bad: int, texts: Sequence[str], side: int
) -> tuple[list[str], list[list[str]]]:
    """Write images of noise, one of which cannot be read.

    Returns:
        Their names, and so many captions of 3 to 8 words for each.
    """
    random = np.random.default_rng(0)
    names = [f"{index:02}.png" for index in range(images)]
    for name in names:
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / names[bad]).write_bytes(b"this is no image")
    captions = [
        [" ".join(random.choice(texts, size=int(random.integers(3, 9)))) for _ in range(each)]
        for _ in names
    ]
    return names, captions
