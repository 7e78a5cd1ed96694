"""Labelled images for judging a frozen encoder."""

from pathlib import Path

import datasets

from hive_vision.data.sources import load_splits


def load_classification(
    source: str | Path, split: str, image_column: str = "image", label_column: str = "label"
) -> datasets.Dataset:
    """Load one split of a classification set.

    Args:
        source: Folder or hub id that ``datasets.load_dataset`` reads.
        split: ``train``, ``test``, ...
        image_column: Column with the images.
        label_column: Column with the class numbers.

    Returns:
        Columns ``image`` (decoded RGB when read) and ``label``.

    Raises:
        ValueError: If the split or a column is missing.
    """
    splits = load_splits(source)
    if split not in splits:
        raise ValueError(
            f"{str(source)!r} has no split {split!r}; its splits are {', '.join(splits)}"
        )
    data = splits[split]
    for name in (image_column, label_column):
        if name not in data.column_names:
            raise ValueError(
                f"{str(source)!r} has no column {name!r}; its columns are "
                f"{', '.join(data.column_names)}"
            )
    data = data.select_columns([image_column, label_column])
    data = data.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    return data.cast_column("image", datasets.Image(mode="RGB"))
