"""LLaVA and COCO json."""

import json
import os
from pathlib import Path

import pytest

from hive_vision.data.json_captions import read_json_captions
from tests.data.helpers import llava_sample, one_line, write_coco, write_llava


def rows(path: Path, kind: str) -> dict[str, list[str]]:
    data = read_json_captions(path, kind)
    return dict(zip(data["image"], data["caption"], strict=True))


def test_llava_takes_the_first_answer(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "chat.json", ["b.jpg", "a/c.jpg"], ["two", "one"])
    assert rows(path, "llava") == {"b.jpg": ["two"], "a/c.jpg": ["one"]}


def test_llava_samples_of_one_image_belong_together(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "chat.json", ["b.jpg", "a.jpg", "b.jpg"], ["one", "two", "three"])
    assert rows(path, "llava") == {"b.jpg": ["one", "three"], "a.jpg": ["two"]}


def test_llava_without_image_or_answer(tmp_path: Path) -> None:
    silent = llava_sample("a.jpg", "one")
    silent["conversations"] = silent["conversations"][:1]
    text_only = llava_sample("b.jpg", "one")
    del text_only["image"]
    path = tmp_path / "chat.json"
    no_image = {**text_only, "image": None}
    path.write_text(json.dumps([silent, text_only, no_image]))
    assert rows(path, "llava") == {"a.jpg": [""]}


def test_coco_joins_by_id(tmp_path: Path) -> None:
    captions = [["one"], ["two", "three ", " four"], []]
    path = write_coco(tmp_path / "captions.json", ["a.jpg", "b.jpg", "c.jpg"], captions)
    expected = {"a.jpg": ["one"], "b.jpg": ["two", "three", "four"], "c.jpg": []}
    assert rows(path, "coco") == expected


def test_coco_caption_without_text_or_image(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "captions.json", ["a.jpg"], [["one"]])
    content = json.loads(path.read_text())
    (first,) = content["annotations"]
    content["annotations"] += [{**first, "caption": None}, {**first, "image_id": 77}]
    path.write_text(json.dumps(content))
    assert rows(path, "coco") == {"a.jpg": ["one", ""]}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "chat.json", ["a.jpg"], ["one"])
    assert rows(path, "llava") == {"a.jpg": ["one"]}
    write_llava(path, ["a.jpg"], ["two"])
    os.utime(path, ns=(1, 1))
    assert rows(path, "llava") == {"a.jpg": ["two"]}


@pytest.mark.parametrize("kind", ["llava", "coco"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "7", '{"images": [{"id": 1}]}', '[{"image": "a", "conversations": "b"}]',
     '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}',
     '{"images": [], "annotations": [3]}'],
)  # fmt: skip
def test_other_content(tmp_path: Path, kind: str, content: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"is not {kind} json") as failure:
        read_json_captions(path, kind)
    assert str(path) in one_line(failure)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no images"):
        read_json_captions(write_llava(tmp_path / "chat.json", [], []), "llava")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file; format coco needs a json file"):
        read_json_captions(tmp_path, "coco")
