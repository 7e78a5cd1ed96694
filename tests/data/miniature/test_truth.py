"""Where the miniature's objects are and which words name them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hive_vision.data.miniature.scenes import COLOURS
from hive_vision.data.miniature.truth import read_named_objects


@pytest.fixture(scope="module")
def folders(miniature: Path) -> tuple[Path, Path]:
    return miniature / "captions" / "validation", miniature / "masks" / "validation"


def test_words_name_the_object_and_the_mask_is_where_it_lies(folders: tuple[Path, Path]) -> None:
    captions, masks = folders
    several = named = 0
    names = [f"{number:06d}.png" for number in range(30)]
    objects = read_named_objects(captions, masks, names)
    assert sorted(objects) == names
    for line in (captions / "metadata.jsonl").read_text().splitlines()[:30]:
        record = json.loads(line)
        found = objects[record["file_name"]]
        assert len(found) == len(record["objects"])
        several += len(found) > 1
        for thing, facts in zip(found, record["objects"], strict=True):
            start, stop = thing.words
            phrase = record["caption"][start:stop].lower()
            assert phrase.startswith(("a ", "an "))
            said = {colour for colour in COLOURS if colour in phrase.split()}
            assert said <= {facts["colour"]}
            named += len(said)
            rows, columns = np.nonzero(thing.mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert list(box) == facts["box"]
            with Image.open(captions / record["file_name"]) as image:
                assert thing.mask.shape == (image.height, image.width)
    assert several
    assert named > 20


def test_objects_that_are_not_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    captions, masks = folders
    with pytest.raises(ValueError, match=r"metadata.jsonl has no scene 'other.png'"):
        read_named_objects(captions, masks, ["000000.png", "other.png"])
    with pytest.raises(ValueError, match=r"does not say where the objects of .000000\.png. are"):
        read_named_objects(captions, tmp_path, ["000000.png"])
    with pytest.raises(ValueError, match="masks needs the folder of one split"):
        read_named_objects(captions.parent, masks, ["000000.png"])
    row = {"file_name": "000000.png", "caption": "a dog"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl does not say where the objects"):
        read_named_objects(tmp_path, masks, ["000000.png"])


def test_masks_of_other_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    captions, masks = folders
    other = masks.parent / "train" / "000000.png"
    assert other.read_bytes() != (masks / "000000.png").read_bytes()
    with pytest.raises(ValueError, match="is the mask of another image; give data and masks of"):
        read_named_objects(captions, masks.parent / "train", ["000000.png"])
    with pytest.raises(ValueError, match="is an image, not a mask"):
        read_named_objects(captions, captions, ["000000.png"])
