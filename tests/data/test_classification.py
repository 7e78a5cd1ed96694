"""Classification sets: the paper's eight as they lie on the hub, one's own, and what is refused."""

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hive_vision.data import classification
from hive_vision.data.classification import (
    KNOWN_SETS,
    ClassificationSet,
    ClassificationSource,
    LabelledImages,
    load_classification_set,
)
from hive_vision.data.images import ColumnImages


def grey(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6), value % 256, dtype=np.uint8))


def names(count: int) -> ClassLabel:
    return ClassLabel(names=[f"class {number}" for number in range(count)])


def table(features: Mapping[str, Any], first: int = 0, **columns: Sequence[Any]) -> Any:
    """Rows whose image says which one it is; columns that are not given are counted."""
    count = len(next(iter(columns.values())))
    kinds = {name: datasets.Image() if kind == "image" else kind for name, kind in features.items()}
    fill: dict[str, Any] = {}
    for name, kind in features.items():
        if kind == "image":
            fill[name] = [grey(first + row) for row in range(count)]
        elif name in columns:
            fill[name] = list(columns[name])
        else:
            text = isinstance(kind, Value) and kind.dtype == "string"
            fill[name] = [f"text {row}" if text else row % 2 for row in range(count)]
    return datasets.Dataset.from_dict(fill, features=Features(kinds))


def write_parquet(folder: Path, splits: Mapping[str, datasets.Dataset]) -> Path:
    """As the hub stores data sets, with a card that says which file is which split.

    No two folders may have one name: datasets takes them for the same if their cards are equal.
    """
    (folder / "data").mkdir(parents=True)
    lines = ["configs:", "- config_name: default", "  data_files:"]
    for split, data in splits.items():
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: data/{split}-*"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    return folder


def write_saved(folder: Path, splits: Mapping[str, datasets.Dataset]) -> Path:
    datasets.DatasetDict(dict(splits)).save_to_disk(folder)
    return folder


def load(name: str | Path, **options: str) -> ClassificationSet:
    return load_classification_set(ClassificationSource(str(name), **options))


def refusal(name: str | Path, **options: str) -> str:
    with pytest.raises(ValueError) as failure:  # noqa: PT011  returned
        load(name, **options)
    assert str(failure.value)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def shades(images: LabelledImages) -> list[int]:
    return [images[row].getpixel((0, 0))[0] for row in range(len(images))]


@dataclass(frozen=True)
class Real:
    """What a set of the paper looks like on the hub.

    Attributes:
        features: Its columns.
        label: The column that is wanted.
        splits: All of them, each with some labels as they are stored.
        test: The split that is wanted to judge by.
        classes: How many there are.
    """

    features: dict[str, Any]
    label: str
    splits: dict[str, list[int]]
    test: str
    classes: int


CORRUPTIONS = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression")
REAL = {
    "cifar10": Real(
        {"img": "image", "label": names(10)},
        "label",
        {"train": [9, 0, 3], "test": [3, 9]},
        "test",
        10,
    ),
    "cifar100": Real(
        {"img": "image", "fine_label": names(100), "coarse_label": names(20)},
        "fine_label",
        {"train": [99, 0, 50], "test": [50, 99]},
        "test",
        100,
    ),
    "imagenet-1k": Real(
        {"image": "image", "label": names(1000)},
        "label",
        {"train": [999, 0, 17], "validation": [17, 999, 0], "test": [-1, -1]},
        "validation",
        1000,
    ),
    "tiny-imagenet": Real(
        {"image": "image", "label": names(200)},
        "label",
        {"train": [0, 199, 5], "valid": [199, 5]},
        "valid",
        200,
    ),
    "food101": Real(
        {"image": "image", "label": names(101)},
        "label",
        {"train": [6, 100, 0], "validation": [100, 6]},
        "validation",
        101,
    ),
    "stanford-cars": Real(
        {"image": "image", "label": names(196)},
        "label",
        {"train": [195, 0, 8], "test": [8, 195], **{name: [195, 8, 8] for name in CORRUPTIONS}},
        "test",
        196,
    ),
    "oxford-pets": Real(
        {
            "image": "image",
            "label": names(37),
            "image_id": Value("string"),
            "label_cat_dog": ClassLabel(names=["cat", "dog"]),
        },
        "label",
        {"train": [36, 0, 12], "test": [12, 36]},
        "test",
        37,
    ),
    "caltech-256": Real(  # numbers from 1, without names
        {"image": "image", "label": Value("int64"), "text": Value("string")},
        "label",
        {"train": [257, 1, 100], "validation": [100, 1], "test": [1, 257, 100]},
        "validation",
        257,
    ),
}


def real_splits(real: Real) -> dict[str, datasets.Dataset]:
    return {
        split: table(real.features, 50 * number, **{real.label: labels})
        for number, (split, labels) in enumerate(real.splits.items())
    }


class TestTheEightSets:
    def test_they_are_the_known_ones(self) -> None:
        assert set(REAL) == set(KNOWN_SETS)
        assert {name: real.classes for name, real in REAL.items()} == {
            name: known.classes for name, known in KNOWN_SETS.items()
        }

    @pytest.mark.parametrize(
        ("name", "write"),
        [(name, write_parquet) for name in REAL]
        + [(name, write_saved) for name in ("tiny-imagenet", "caltech-256")],
    )
    def test_a_local_copy(self, name: str, write: Any, tmp_path: Path) -> None:
        real = REAL[name]
        write(tmp_path, real_splits(real))
        data = load(f"{name}:{tmp_path}")
        assert (data.name, data.classes) == (name, real.classes)
        first = 1 if name == "caltech-256" else 0
        for number, (split, labels) in enumerate(real.splits.items()):
            if split not in ("train", real.test):
                continue
            images = data.train if split == "train" else data.test
            assert images.labels.tolist() == [label - first for label in labels]
            assert images.labels.dtype == np.int64
            assert shades(images) == [50 * number + row for row in range(len(labels))]
            assert {images[row].mode for row in range(len(images))} == {"RGB"}
            assert images.name == f"{name} {split}"
        expected = () if name == "caltech-256" else tuple(names(real.classes).names)
        assert data.class_names == expected
        assert data.settings == {
            "source": str(tmp_path),
            "train_split": "train",
            "test_split": real.test,
            "image_column": "img" if name.startswith("cifar") else "image",
            "label_column": real.label,
            "metric": "accuracy",
        }

    def test_names_in_a_column_of_their_own(self, tmp_path: Path) -> None:
        """Caltech-256's, without which there is no zero-shot classification of it."""
        numbers = list(range(1, 258))
        texts = [f"thing {number}" for number in numbers]
        real = REAL["caltech-256"].features
        splits = {
            "train": table(real, label=[*numbers, 1], text=[*texts, texts[0]]),
            "validation": table(real, label=[3], text=["thing 3"]),
        }
        assert load(f"caltech-256:{write_parquet(tmp_path / 'a', splits)}").class_names == (*texts,)
        splits["train"] = table(real, label=[*numbers, 1], text=[*texts, "another"])
        assert load(f"caltech-256:{write_parquet(tmp_path / 'b', splits)}").class_names == ()

    def test_a_copy_without_a_card_calls_valid_validation(self, tmp_path: Path) -> None:
        for split, data in real_splits(REAL["tiny-imagenet"]).items():
            data.to_parquet(tmp_path / f"{split}.parquet")
        data = load(f"tiny-imagenet:{tmp_path}")
        assert data.settings["test_split"] == "validation"
        assert data.test.labels.tolist() == REAL["tiny-imagenet"].splits["valid"]

    def test_other_splits_and_columns_by_choice(self, tmp_path: Path) -> None:
        folder = write_parquet(tmp_path / "cars", real_splits(REAL["stanford-cars"]))
        data = load(f"stanford-cars:{folder}", test_split="contrast")
        assert data.test.labels.tolist() == REAL["stanford-cars"].splits["contrast"]
        pets = write_parquet(tmp_path / "pets", real_splits(REAL["oxford-pets"]))
        data = load(pets, label_column="label_cat_dog")
        assert (data.name, data.classes, data.class_names) == ("pets", 2, ("cat", "dog"))

    def test_labels_that_the_hub_hides(self, tmp_path: Path) -> None:
        folder = write_parquet(tmp_path, real_splits(REAL["imagenet-1k"]))
        text = refusal(f"imagenet-1k:{folder}", test_split="test")
        assert "imagenet-1k test has images without a label (label -1)" in text
        assert "test_split=" in text

    def test_numbers_from_0_in_a_set_that_counts_from_1(self, tmp_path: Path) -> None:
        splits = {
            "train": table(REAL["caltech-256"].features, label=[0, 1]),
            "validation": table(REAL["caltech-256"].features, label=[0, 1]),
        }
        assert "(label 0)" in refusal(f"caltech-256:{write_parquet(tmp_path / 'c', splits)}")

    def test_another_set_under_a_known_name(self, tmp_path: Path) -> None:
        folder = write_parquet(tmp_path, real_splits(REAL["cifar10"]))
        text = refusal(f"stanford-cars:{folder}")
        assert "should have 196 classes but names 10" in text


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images 0 ... 4 to train on and 10, 11 to test, with columns of other names."""
    folder = tmp_path_factory.mktemp("own")
    features = {
        "picture": "image",
        "class": ClassLabel(names=["even", "odd"]),
        "rank": Value("float32"),
        "caption": Value("string"),
        "nobody": Value("int64"),
    }
    for split, first, count in (("train", 0, 5), ("test", 10, 2)):
        labels = [row % 2 for row in range(count)]
        columns = {"class": labels, "nobody": [None, *labels[1:]], "rank": [0.5] * count}
        table(features, first, **columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


OWN = {"image_column": "picture", "label_column": "class"}


class TestOnesOwn:
    def test_two_folders_of_one_name_with_one_card(self, tmp_path: Path) -> None:
        features = {"image": "image", "label": names(2)}
        for first in (0, 100):
            splits = {split: table(features, first, label=[0, 1]) for split in ("train", "test")}
            folder = write_parquet(tmp_path / str(first) / "pictures", splits)
            assert shades(load(folder).train) == [first, first + 1]

    def test_parquet_with_columns_of_other_names(self, own: Path) -> None:
        data = load(own, **OWN)
        assert (data.name, data.classes, data.class_names) == (own.name, 2, ("even", "odd"))
        assert data.train.labels.tolist() == [0, 1, 0, 1, 0]
        assert data.test.labels.tolist() == [0, 1]
        assert shades(data.train) == list(range(5))
        assert shades(data.test) == [10, 11]

    def test_splits_by_choice(self, own: Path) -> None:
        data = load(own, **OWN, train_split="test", test_split="train")
        assert (shades(data.train), shades(data.test)) == ([10, 11], list(range(5)))
        assert (data.settings["train_split"], data.settings["test_split"]) == ("test", "train")

    def test_a_folder_for_each_class(self, tmp_path: Path) -> None:
        write_classes(tmp_path, {"train": ("cat", "dog"), "test": ("cat", "dog")})
        data = load(tmp_path)
        assert (data.classes, data.class_names) == (2, ("cat", "dog"))
        for images in (data.train, data.test):
            assert dict(zip(images.labels.tolist(), shades(images), strict=True)) == {0: 3, 1: 4}

    @pytest.mark.parametrize("split", ["validation", "val", "dev"])
    def test_a_split_that_is_called_validation(self, split: str, tmp_path: Path) -> None:
        write_classes(tmp_path, {"train": ("cat", "dog"), split: ("cat", "dog")})
        assert load(tmp_path).settings["test_split"] == "validation"

    def test_test_goes_before_validation(self, tmp_path: Path) -> None:
        parts = {"train": ("cat", "dog"), "validation": ("cat",), "test": ("dog",)}
        write_classes(tmp_path, parts)
        assert load(tmp_path).test.labels.tolist() == [1]

    @pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "int64"])
    def test_numbers_without_names(self, kind: str, tmp_path: Path) -> None:
        features = {"image": "image", "label": Value(kind)}
        splits = {
            "train": table(features, label=[0, 5, 2]),
            "test": table(features, label=[2, 2, 5, 0]),
        }
        data = load(write_parquet(tmp_path, splits))
        assert (data.classes, data.class_names) == (3, ())
        assert data.train.labels.tolist() == [0, 2, 1]
        assert data.test.labels.tolist() == [1, 1, 2, 0]
        assert data.test.labels.dtype == np.int64

    def test_numbers_that_are_ids(self, tmp_path: Path) -> None:
        features = {"image": "image", "label": Value("int64")}
        splits = {split: table(features, label=[10**12, 7]) for split in ("train", "test")}
        data = load(write_parquet(tmp_path / "a", splits))
        assert (data.classes, data.test.labels.tolist()) == (2, [1, 0])
        splits["test"] = table(features, label=[8])
        text = refusal(write_parquet(tmp_path / "b", splits))
        assert "test images of class 8, which no training image has" in text

    def test_images_that_are_files_beside_the_table(self, tmp_path: Path) -> None:
        for split, values in (("train", (1, 2)), ("test", (2, 1))):
            rows = {"image": [f"{value}.png" for value in values], "label": list(values)}
            pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
        for value in (1, 2):
            grey(value).save(tmp_path / f"{value}.png")
        assert shades(load(tmp_path).test) == [2, 1]


def write_classes(root: Path, splits: Mapping[str, Sequence[str]]) -> None:
    for split, classes in splits.items():
        for value, name in enumerate(classes, start=3):
            folder = root / split / name
            folder.mkdir(parents=True)
            grey(value).convert("RGBA").save(folder / "0.png")


class TestRefusals:
    @pytest.mark.parametrize("role", ["train", "test"])
    def test_no_such_split(self, own: Path, role: str) -> None:
        text = refusal(own, **OWN, **{f"{role}_split": "dev"})
        assert "no split 'dev'; its splits are train, test: choose with train_split=" in text

    def test_no_usual_split(self, tmp_path: Path) -> None:
        features = {"image": "image", "label": names(2)}
        folder = write_parquet(tmp_path, {"train": table(features, label=[0, 1])})
        text = refusal(folder)
        assert "'test' or 'validation' or 'valid' or 'val'; its splits are train" in text

    @pytest.mark.parametrize("missing", ["image", "label"])
    def test_no_such_column(self, own: Path, missing: str) -> None:
        text = refusal(own, **(OWN | {f"{missing}_column": "nothing"}))
        assert "no column 'nothing'; its columns are picture, class, rank, caption" in text
        assert f"{missing}_column=" in text

    def test_no_usual_column(self, own: Path) -> None:
        assert "no column 'image' or 'img'; its columns are picture" in refusal(own)
        assert "'label' or 'fine_label'" in refusal(own, image_column="picture")

    def test_one_split_for_both(self, own: Path) -> None:
        text = refusal(own, **OWN, test_split="train")
        assert "test_split and train_split are both 'train'" in text

    @pytest.mark.parametrize("column", ["caption", "rank", "picture"])
    def test_labels_that_are_no_class_numbers(self, own: Path, column: str) -> None:
        text = refusal(own, image_column="picture", label_column=column)
        assert f"column {column!r} holds" in text
        assert "label_column=" in text

    def test_a_missing_label(self, own: Path) -> None:
        text = refusal(own, image_column="picture", label_column="nobody")
        assert "train has images without a label" in text
        assert "(label null)" in text

    @pytest.mark.parametrize("column", ["rank", "class", "nobody"])
    def test_images_that_are_none(self, own: Path, column: str) -> None:
        text = refusal(own, image_column=column, label_column="class")
        assert f"column {column!r} holds" in text
        assert "not images" in text

    def test_other_classes_in_the_test(self, tmp_path: Path) -> None:
        splits = {
            split: table({"image": "image", "label": names(count)}, label=[0, 1])
            for split, count in (("train", 3), ("test", 2))
        }
        text = refusal(write_saved(tmp_path / "set", splits))
        assert "3 classes in its split 'train' and 2 in 'test'" in text

    def test_the_same_classes_in_another_order(self, tmp_path: Path) -> None:
        splits = {
            split: table({"image": "image", "label": ClassLabel(names=order)}, label=[0, 1])
            for split, order in (("train", ["cat", "dog"]), ("test", ["dog", "cat"]))
        }
        folder = write_saved(tmp_path, splits)
        assert "their order differs" in refusal(folder)

    def test_a_test_class_without_a_training_image(self, tmp_path: Path) -> None:
        write_classes(tmp_path, {"train": ("cat", "dog"), "test": ("dog", "horse")})
        assert "test images of class 2 (horse)" in refusal(tmp_path)

    def test_a_number_beyond_the_classes(self, tmp_path: Path) -> None:
        features = {"image": "image", "label": Value("int64"), "text": Value("string")}
        splits = {
            split: table(features, label=[1, 2, 300]) for split in ("train", "validation", "test")
        }
        text = refusal(f"caltech-256:{write_parquet(tmp_path / 'set', splits)}")
        assert "should have 257 classes but has images of class 299" in text

    def test_one_class(self, tmp_path: Path) -> None:
        features = {"image": "image", "label": names(2)}
        splits = {"train": table(features, label=[1, 1]), "test": table(features, label=[1])}
        folder = write_parquet(tmp_path, splits)
        assert "one class to train on; at least 2" in refusal(folder)

    def test_a_folder_of_one_class(self, tmp_path: Path) -> None:
        write_classes(tmp_path, {"train": ("cat",), "test": ("cat",)})
        assert (
            "images without classes in its split 'train': put them in a folder for each"
            in refusal(tmp_path)
        )

    @pytest.mark.parametrize("empty", ["train", "test"])
    def test_empty(self, empty: str, tmp_path: Path) -> None:
        features = {"image": "image", "label": names(2)}
        splits = {
            split: table(features, label=[] if split == empty else [0, 1])
            for split in ("train", "test")
        }
        folder = write_parquet(tmp_path, splits)
        assert str(folder) in refusal(folder)

    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("cifar-10", "cifar10"),
            ("imagenet1k", "imagenet-1k"),
            ("oxfordpets:/data/pets", "oxford-pets"),
        ],
    )
    def test_unknown_name(self, given: str, meant: str) -> None:
        text = refusal(given)
        assert "unknown classification set" in text
        assert f"did you mean {meant!r}?" in text

    def test_unknown_name_that_resembles_none(self) -> None:
        assert all(name in refusal("zzzz") for name in KNOWN_SETS)

    @pytest.mark.parametrize("known", ["", "cifar10:"])
    def test_nothing_there(self, known: str, tmp_path: Path) -> None:
        text = refusal(f"{known}{tmp_path / 'nowhere'}")
        assert f"'{tmp_path / 'nowhere'}'" in text
        assert "does not exist" in text

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert str(tmp_path) in refusal(tmp_path)

    def test_a_hub_id_without_a_network(self) -> None:
        assert "uoft-cs/cifar10" in refusal("cifar10")
        assert "someone/something" in refusal("someone/something")


def stored(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def in_memory(contents: Sequence[bytes], labels: Sequence[int]) -> LabelledImages:
    rows = [{"bytes": content, "path": None} for content in contents]
    data = datasets.Dataset.from_dict(
        {"image": rows}, features=Features({"image": datasets.Image(decode=False)})
    )
    return LabelledImages("set test", ColumnImages(data, "image", "set"), np.array(labels))


class TestDecoding:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (stored(grey(77)), (77, 77, 77)),
            (stored(Image.fromarray(np.full((6, 6), 77 * 256, np.uint16))), (77, 77, 77)),
            (stored(Image.new("RGBA", (6, 6), (9, 8, 7, 255))), (9, 8, 7)),
            (stored(Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
            (stored(Image.new("RGB", (6, 6), (9, 8, 7)).quantize(4)), (9, 8, 7)),
            (stored(Image.new("1", (6, 6), 1)), (255, 255, 255)),
        ],
        ids=["grey", "16 bits", "alpha", "cmyk", "palette", "1 bit"],
    )
    def test_every_kind_becomes_rgb(self, content: bytes, expected: tuple[int, ...]) -> None:
        image = in_memory([content], [0])[0]
        assert image.mode == "RGB"
        assert image.getpixel((3, 3)) == expected

    @pytest.mark.parametrize(
        "content", [b"", b"no image", stored(grey(1))[:50]], ids=["empty", "text", "cut"]
    )
    def test_a_corrupt_image_is_named(self, content: bytes) -> None:
        images = in_memory([stored(grey(1)), content], [0, 1])
        assert images[0].size == (6, 6)
        with pytest.raises(
            ValueError, match=r"^image 1 \(row 1\) of set test cannot be"
        ) as failure:
            images[1]
        assert "\n" not in str(failure.value)

    def test_a_corrupt_file_is_named(self, tmp_path: Path) -> None:
        write_classes(tmp_path, {"train": ("cat", "dog"), "test": ("cat", "dog")})
        (tmp_path / "test" / "dog" / "0.png").write_bytes(b"nothing")
        test = load(tmp_path).test
        with pytest.raises(ValueError, match=r"^image 1 \(test/dog/0.png\) of"):
            test[1]


class TestFingerprint:
    @settings(max_examples=30, deadline=None)
    @given(
        rows=st.lists(st.tuples(st.binary(max_size=4), st.integers(0, 3)), min_size=1, max_size=5),
        other=st.lists(st.tuples(st.binary(max_size=4), st.integers(0, 3)), min_size=1, max_size=5),
    )
    def test_is_equal_for_equal_content_only(self, rows: Any, other: Any) -> None:
        first, second = (
            in_memory([content for content, _ in given], [label for _, label in given])
            for given in (rows, other)
        )
        assert (first.fingerprint == second.fingerprint) == (rows == other)

    @pytest.mark.parametrize(
        ("contents", "labels"),
        [
            ([b"aa", b"bb", b"cc"], [0, 1, 0]),
            ([b"aa", b"bb", b"cd"], [0, 1, 1]),
            ([b"aa", b"cc", b"bb"], [0, 1, 1]),
            ([b"aa", b"bbc", b"c"], [0, 1, 1]),
            ([b"aa", b"bb"], [0, 1]),
        ],
        ids=["label", "byte", "order", "ends", "count"],
    )
    def test_changes_with(self, contents: list[bytes], labels: list[int]) -> None:
        plain = in_memory([b"aa", b"bb", b"cc"], [0, 1, 1]).fingerprint
        assert in_memory([b"aa", b"bb", b"cc"], [0, 1, 1]).fingerprint == plain
        assert in_memory(contents, labels).fingerprint != plain

    def test_sizes_and_labels_of_all_images_count(self) -> None:
        """Of many images the bytes of some are not read."""
        contents = [str(row).encode().zfill(6) for row in range(6_000)]
        plain = in_memory(contents, [0] * 6_000).fingerprint
        for row in (1, 5_998):
            longer = [*contents[:row], b"longer than 6", *contents[row + 1 :]]
            assert in_memory(longer, [0] * 6_000).fingerprint != plain
            labels = [int(other == row) for other in range(6_000)]
            assert in_memory(contents, labels).fingerprint != plain

    def test_files_of_a_large_set_count_with_their_time_of_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those between the ones whose bytes are read may change too, to as many bytes."""
        monkeypatch.setattr(classification, "HASHED_IMAGES", 2)
        for row in range(4):
            (tmp_path / "train" / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
            grey(7).save(tmp_path / "train" / "ab"[row % 2] / f"{row}.bmp")
        shutil.copytree(tmp_path / "train", tmp_path / "test")
        before = load(tmp_path).train.fingerprint
        assert load(tmp_path).train.fingerprint == before
        grey(9).save(tmp_path / "train" / "b" / "1.bmp")
        assert load(tmp_path).train.fingerprint != before

    def test_does_not_depend_on_the_place(
        self, tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_classes(tmp_path / "a", {"train": ("cat", "dog"), "test": ("cat", "dog")})
        shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
        first, second = load(tmp_path / "a"), load(tmp_path / "elsewhere" / "b")
        assert first.train.fingerprint == second.train.fingerprint
        assert first.train.fingerprint != first.test.fingerprint
        monkeypatch.chdir(tmp_path)
        assert load("./elsewhere/b").train.fingerprint == first.train.fingerprint
        shutil.copytree(own, tmp_path / "c")
        fingerprints = {load(path, **OWN).test.fingerprint for path in (own, tmp_path / "c")}
        assert len(fingerprints) == 1

    def test_names_of_files_count(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "a", {"train": ("cat", "dog"), "test": ("cat", "dog")})
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b/train/cat/0.png").rename(tmp_path / "b/train/cat/1.png")
        first, second = load(tmp_path / "a"), load(tmp_path / "b")
        assert first.train.fingerprint != second.train.fingerprint
        assert first.test.fingerprint == second.test.fingerprint
