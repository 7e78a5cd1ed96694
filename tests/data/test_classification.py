"""Labelled images from folders of classes and from parquet files."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hive_vision.data.classification import load_classification


def grey(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6), value, dtype=np.uint8))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images 0 ... 4 to train on and 10, 11 to test, two classes."""
    folder = tmp_path_factory.mktemp("classification")
    names = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features(
        {"img": datasets.Image(), "class": names, "id": datasets.Value("int64")}
    )
    for split, values in (("train", range(5)), ("test", range(10, 12))):
        rows = {
            "img": [grey(v) for v in values],
            "class": [v % 2 for v in values],
            "id": list(values),
        }
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(("split", "values"), [("train", range(5)), ("test", range(10, 12))])
def test_parquet_with_columns_of_other_names(parquet: Path, split: str, values: range) -> None:
    data = load_classification(parquet, split, image_column="img", label_column="class")
    assert data.column_names == ["image", "label"]
    assert list(data["label"]) == [value % 2 for value in values]
    assert data.features["label"].names == ["even", "odd"]
    assert [image.getpixel((0, 0)) for image in data["image"]] == [(v, v, v) for v in values]
    assert {image.mode for image in data["image"]} == {"RGB"}


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for value, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            grey(value).convert("RGBA").save(folder / "0.png")
    for split in ("train", "test"):
        data = load_classification(tmp_path, split)
        assert data.features["label"].names == ["cat", "dog"]
        rows = {row["label"]: row["image"] for row in data}
        assert {label: image.getpixel((0, 0))[0] for label, image in rows.items()} == {0: 0, 1: 1}
        assert {image.mode for image in rows.values()} == {"RGB"}


def test_missing_split_names_those_there(parquet: Path) -> None:
    with pytest.raises(ValueError, match="no split 'validation'; its splits are train, test"):
        load_classification(parquet, "validation", "img", "class")


@pytest.mark.parametrize("missing", ["image", "label"])
def test_missing_column_names_those_there(parquet: Path, missing: str) -> None:
    columns = {"image_column": "img", "label_column": "class"} | {f"{missing}_column": missing}
    with pytest.raises(ValueError, match=f"no column '{missing}'; its columns are img, class, id"):
        load_classification(parquet, "train", **columns)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere") as failure:
        load_classification(tmp_path / "nowhere", "train")
    assert "\n" not in str(failure.value)
