"""Labelled images for judging a frozen encoder: the paper's eight sets and anyone's own.

Shapes: M images of a split.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from hive_vision.data.images import (
    ColumnImages,
    UnusableImageError,
    decode_image,
    holds_images,
    read_bytes,
)
from hive_vision.data.sources import hash_column, hash_parts, load_splits
from hive_vision.naming import unknown_name

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
# Of sets that are not in the table; the first that is there.
TEST_SPLITS = ("test", "validation", "valid", "val")
HASHED_IMAGES = 4096


@dataclass(frozen=True)
class KnownSet:
    """How one of the paper's sets is stored on the hub.

    Attributes:
        hub_id: Where it is.
        classes: How many there are.
        test_splits: What the paper's numbers are measured on; a copy without the hub's own
            description calls ``valid`` ``validation``.
        image_column: Column with the images.
        label_column: Column with the class numbers.
        first_label: Number of the first class.
        name_column: Column with each image's class as a text, where the labels have no names.
        metric: What the paper reports: share of test images whose class is found.
    """

    hub_id: str
    classes: int
    test_splits: tuple[str, ...]
    image_column: str = "image"
    label_column: str = "label"
    first_label: int = 0
    name_column: str | None = None
    metric: str = "accuracy"


# Paper, Table 1. Ids, columns and splits are those of the datasets' cards; where there are several
# labelled splits beside train, the authors' code takes validation before test.
KNOWN_SETS = {
    "cifar10": KnownSet("uoft-cs/cifar10", 10, ("test",), image_column="img"),
    "cifar100": KnownSet("uoft-cs/cifar100", 100, ("test",), "img", "fine_label"),
    "imagenet-1k": KnownSet("ILSVRC/imagenet-1k", 1000, ("validation",)),
    "tiny-imagenet": KnownSet("zh-plus/tiny-imagenet", 200, ("valid", "validation")),
    "food101": KnownSet("ethz/food101", 101, ("validation",)),
    "stanford-cars": KnownSet("tanganke/stanford_cars", 196, ("test",)),
    "oxford-pets": KnownSet("timm/oxford-iiit-pet", 37, ("test",)),
    "caltech-256": KnownSet(
        "ilee0022/Caltech-256", 257, ("validation",), first_label=1, name_column="text"
    ),
}


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """One split of a classification set.

    Attributes:
        name: The set and the split, for messages.
        images: M stored images.
        labels: Class numbers from 0, (M,).
    """

    name: str
    images: ColumnImages
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Image.Image:
        """Decode an image to RGB.

        Raises:
            ValueError: If it cannot be decoded; one line that names it.
        """
        try:
            return decode_image(self.images.read(row))
        except UnusableImageError as error:
            raise ValueError(
                f"image {row} ({self.images.name(row)}) of {self.name} cannot be read: {error}; "
                "repair it or remove it from the set"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, sizes, labels, and the bytes of up to 4,096 images among them.

        Of a larger set the bytes of the others do not count, so that asking is quick: there, files
        count with their size and time of change, embedded images with their size.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, HASHED_IMAGES).astype(int))
        facts = [hash_column(column) for column in self.images.facts()]
        if len(self) > HASHED_IMAGES:
            facts.append(repr(list(_file_states(self.images))).encode())
        content = (
            hashlib.sha256(read_bytes(self.images.read(row))).digest() for row in chosen.tolist()
        )
        return hash_parts(*facts, self.labels.tobytes(), *content)


def _file_states(images: ColumnImages) -> Iterator[tuple[int, int]]:
    """Size and time of change of every image that is a file of its own."""
    for row in range(len(images)):
        stored = images.read(row)
        if stored["bytes"] is None and stored["path"] is not None and Path(stored["path"]).exists():
            state = os.stat(stored["path"])
            yield state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class ClassificationSet:
    """Images to train a head on, and images to judge it by.

    Attributes:
        name: As it was asked for.
        train: Training images.
        test: Test images.
        classes: How many classes there are.
        class_names: Their names, where the data has them.
        settings: Where it came from: path, splits and columns.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    classes: int
    class_names: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassificationSource:
    """Which set, and how it is read; what is null is found.

    Args:
        name: A name of the table, a name and a local copy (``cifar10:/data/cifar10``), a folder,
            or a hub id.
        image_column: Column with the images.
        label_column: Column with the class numbers.
        train_split: Split to train on.
        test_split: Split to judge by.
    """

    name: str
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None


def load_classification_set(source: ClassificationSource) -> ClassificationSet:
    """Load a classification set through the datasets library.

    Raises:
        ValueError: If it is not there, lacks a split, a column or labels, has one class, or has
            test classes without a training image.
    """
    name, known, path = _find(source.name)
    try:
        splits = load_splits(path)
    except ValueError as error:
        reason = str(error.__cause__ or "it does not exist").strip().partition("\n")[0]
        raise ValueError(
            f"no classification set at {path!r}: give a folder with a folder for each class below "
            f"train and test, parquet files, a saved dataset, or a hub id ({reason})"
        ) from error
    defaults = known or KnownSet(path, 0, TEST_SPLITS)
    train_split = _choose("split", source.train_split, ("train",), splits, source.name)
    test_split = _choose("split", source.test_split, defaults.test_splits, splits, source.name)
    if train_split == test_split:
        raise ValueError(f"{source.name!r}: test_split and train_split are both {train_split!r}")
    parts = {}
    for role, split in (("train", train_split), ("test", test_split)):
        data = splits[split]
        there = data.column_names
        own = (defaults.image_column, *IMAGE_COLUMNS)
        image = _choose("column", source.image_column, own, there, source.name)
        if there == [image]:
            raise ValueError(
                f"{source.name!r} has images without classes in its split {split!r}: put them in a "
                "folder for each class, of which there must be at least 2"
            )
        own = (defaults.label_column, *LABEL_COLUMNS)
        label = _choose("column", source.label_column, own, there, source.name)
        kind = data.data.schema.field(image).type
        if not holds_images(kind):
            raise ValueError(
                f"{source.name!r}: column {image!r} holds {kind}, not images; choose another with "
                "image_column="
            )
        parts[role] = (data.cast_column(image, datasets.Image(decode=False)), image, label)
    names = {role: _class_names(data, label) for role, (data, _, label) in parts.items()}
    if names["train"] != names["test"]:
        differing = set(names["train"]) ^ set(names["test"])
        what = f"{sorted(differing)[0]!r} is in one only" if differing else "their order differs"
        raise ValueError(
            f"{source.name!r} has {len(names['train'])} classes in its split {train_split!r} and "
            f"{len(names['test'])} in {test_split!r}, and {what}; both need the same in one order"
        )
    both = {
        role: _labelled(f"{name} {split}", path, *parts[role], defaults.first_label)
        for role, split in (("train", train_split), ("test", test_split))
    }
    if known is None and not names["train"]:
        both = _numbered(source.name, both["train"], both["test"])
    classes = known.classes if known else len(names["train"]) or int(both["train"].labels.max()) + 1
    _check_classes(source.name, both["train"], both["test"], classes, names["train"])
    class_names = names["train"]
    if not class_names and defaults.name_column in splits[train_split].column_names:
        texts = splits[train_split][defaults.name_column]
        class_names = _names_of_images(both["train"].labels, texts, classes)
    return ClassificationSet(
        name,
        both["train"],
        both["test"],
        classes,
        class_names,
        {
            "source": path,
            "train_split": train_split,
            "test_split": test_split,
            "image_column": parts["train"][1],
            "label_column": parts["train"][2],
            "metric": defaults.metric,
        },
    )


def _find(given: str) -> tuple[str, KnownSet | None, str]:
    """Split ``name``, ``name:path`` or ``path`` into a name, a table entry and a place."""
    name, colon, path = given.partition(":")
    if name in KNOWN_SETS:
        return name, KNOWN_SETS[name], path or KNOWN_SETS[name].hub_id
    if colon and not Path(given).exists():
        raise ValueError(unknown_name("classification set", name, KNOWN_SETS))
    by_id = [known for known in KNOWN_SETS.items() if known[1].hub_id == given]
    if by_id:
        return *by_id[0], given
    if not Path(given).exists() and "/" not in given:
        what = unknown_name("classification set", given, KNOWN_SETS)
        raise ValueError(f"{what} (or give a folder, or a hub id)")
    return Path(given).name, None, given


def _choose(what: str, given: str | None, usual: tuple[str, ...], there: Any, source: str) -> str:
    """Take what was asked for, or the first usual one that is there.

    Raises:
        ValueError: If it is not there.
    """
    wanted = (given,) if given is not None else usual
    for name in wanted:
        if name in there:
            return name
    missing = " or ".join(repr(name) for name in dict.fromkeys(wanted))
    raise ValueError(
        f"{source!r} has no {what} {missing}; its {what}s are {', '.join(there)}: choose with "
        f"{'train_split= and test_split=' if what == 'split' else 'image_column=, label_column='}"
    )


def _class_names(data: datasets.Dataset, label: str) -> tuple[str, ...]:
    kind = data.features[label]
    return tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()


def _numbered(name: str, train: LabelledImages, test: LabelledImages) -> dict[str, LabelledImages]:
    """Number the classes of labels without names from 0 on, as they occur among training images.

    Raises:
        ValueError: If a test class does not.
    """
    values = np.unique(train.labels)
    unseen = np.setdiff1d(test.labels, values)
    if len(unseen):
        raise ValueError(
            f"{name!r} has test images of class {int(unseen[0])}, which no training image has"
        )
    return {
        role: replace(images, labels=np.searchsorted(values, images.labels))
        for role, images in (("train", train), ("test", test))
    }


def _names_of_images(
    labels: NDArray[np.int64], texts: Sequence[str], classes: int
) -> tuple[str, ...]:
    """Name classes by the texts beside their images; none if they do not name every class."""
    names = dict(zip(labels.tolist(), texts, strict=True))
    agree = all(names[label] == text for label, text in zip(labels.tolist(), texts, strict=True))
    if not agree or len(names) < classes:
        return ()
    return tuple(names[label] for label in range(classes))


def _labelled(
    name: str, root: str, data: datasets.Dataset, image: str, label: str, first_label: int
) -> LabelledImages:
    stored = data.data.column(label)
    if not pa.types.is_integer(stored.type):
        raise ValueError(
            f"{name}: column {label!r} holds {stored.type}, not class numbers; choose another "
            "with label_column=, or number the classes (datasets: class_encode_column)"
        )
    if not len(stored):
        raise ValueError(f"{name} is empty")
    labels = stored.drop_null().to_numpy().astype(np.int64, copy=False) - first_label
    if stored.null_count or labels.min() < 0:
        found = "null" if stored.null_count else labels.min() + first_label
        raise ValueError(
            f"{name} has images without a label (label {found}); choose a labelled split with "
            "train_split= and test_split="
        )
    return LabelledImages(name, ColumnImages(data, image, root), labels)


def _check_classes(
    name: str,
    train: LabelledImages,
    test: LabelledImages,
    classes: int,
    class_names: tuple[str, ...],
) -> None:
    """Refuse sets on which an accuracy says nothing.

    Raises:
        ValueError: If classes are missing, too many or only one.
    """
    if class_names and len(class_names) != classes:
        raise ValueError(f"{name!r} should have {classes} classes but names {len(class_names)}")
    known = np.unique(train.labels)
    if len(known) < 2:
        raise ValueError(f"{name!r} has one class to train on; at least 2 are needed")
    highest = int(max(train.labels.max(), test.labels.max()))
    if highest >= classes:
        raise ValueError(
            f"{name!r} should have {classes} classes but has images of class {highest}, counted "
            "from 0"
        )
    unseen = np.setdiff1d(test.labels, known)
    if len(unseen):
        which = int(unseen[0])
        called = f" ({class_names[which]})" if class_names else ""
        raise ValueError(
            f"{name!r} has {len(known)} classes to train on, and test images of class {which}"
            f"{called}, which is not among them"
        )
