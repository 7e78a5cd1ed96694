"""Captioned images: loading, tokenizing, and what happens to samples that cannot be used."""

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import datasets
import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MIN_HELD_OUT = 32  # fewer say little, and one cannot be given another one's image
SPLIT_SEED = 0  # the held-out part is the same for every method and run seed


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and what was taken instead.

    Attributes:
        sample_id: Its row in the training part of the data.
        source: The image file, or the row where images are embedded.
        reason: Why.
        replaced_by: Row that was used instead.
    """

    sample_id: int
    source: str
    reason: str
    replaced_by: int


class Caption(TypedDict):
    """One training sample: an RGB image and ``<start> caption <end>`` as token ids."""

    image: Image.Image
    input_ids: list[int]
    sample_id: int
    bad_samples: list[BadSample]


def load_captioned_images(
    source: str | Path,
    image_column: str = "image",
    caption_column: str = "caption",
    validation: str | Path | None = None,
    holdout: float = 0.02,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load training and held-out captions.

    Args:
        source: A folder of images with ``metadata.jsonl``/``.csv``/``.parquet`` (the image-folder
            convention of the datasets library), any other folder that ``load_dataset`` reads
            (parquet, splits in subfolders), or a hub id.
        image_column: Column with the images; an image folder always calls it ``image``.
        caption_column: Column with the captions.
        validation: Held-out data; if not given, the source's own ``validation`` split or a part
            split off.
        holdout: Share to split off when there is no held-out data; of small sets more, up to 32
            samples or a fifth.

    Returns:
        Training and held-out data with columns ``image`` (not decoded) and ``caption``.

    Raises:
        ValueError: If nothing is found, or a column is missing (those found are listed).
    """
    splits = load_splits(source)
    if validation is not None:
        held_out = _choose_split(load_splits(validation), "validation", validation)
        train = _choose_split(splits, "train", source)
    elif "validation" in splits:
        held_out = splits.pop("validation")
        train = _choose_split(splits, "train", source)
    else:
        whole = _choose_split(splits, "train", source)
        if len(whole) < 2:
            raise ValueError(
                f"{str(source)!r} has {len(whole)} samples; at least 2 are needed, "
                "one of them is held out"
            )
        size = max(1, round(holdout * len(whole)), min(MIN_HELD_OUT, len(whole) // 5))
        parts = whole.train_test_split(test_size=size, seed=SPLIT_SEED)
        train, held_out = parts["train"], parts["test"]
    columns = (image_column, caption_column)
    return _keep_columns(train, *columns, source), _keep_columns(held_out, *columns, source)


def load_splits(source: str | Path) -> datasets.DatasetDict:
    """Load all splits of a folder or hub id.

    Raises:
        ValueError: If there is nothing to load.
    """
    path = Path(source)
    if path.is_file():
        raise ValueError(
            f"{str(source)!r} is a file; give the folder that holds images and metadata"
        )
    try:
        if any((path / name).is_file() for name in METADATA_FILES):
            # All files: else a file named like a split ("train-station.png") would be the only one.
            return datasets.load_dataset(
                "imagefolder", data_files={"train": f"{glob.escape(str(path))}/**"}
            )
        return datasets.load_dataset(str(source))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no images found at {str(source)!r}: give a folder with images and one of "
            f"{', '.join(METADATA_FILES)}, or a hub id ({reason})"
        ) from error


def _choose_split(
    splits: datasets.DatasetDict, wanted: str, source: str | Path
) -> datasets.Dataset:
    """Take the split that is wanted, or the only one there is."""
    if wanted not in splits and len(splits) != 1:
        found = ", ".join(splits) or "only validation"
        raise ValueError(f"{str(source)!r} has no split {wanted!r}; its splits: {found}")
    chosen = splits[wanted] if wanted in splits else next(iter(splits.values()))
    if len(chosen) == 0:
        raise ValueError(f"the data set {str(source)!r} is empty")
    return chosen


def _keep_columns(
    data: datasets.Dataset, image_column: str, caption_column: str, source: str | Path
) -> datasets.Dataset:
    for name, key in ((image_column, "image_column"), (caption_column, "caption_column")):
        if name not in data.column_names:
            raise ValueError(
                f"{str(source)!r} has no column {name!r}; its columns are "
                f"{', '.join(data.column_names)}: set data.{key}"
            )
    kind = data.features[caption_column]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"caption column {caption_column!r} of {str(source)!r} holds {kind}, not text"
        )
    data = data.select_columns([image_column, caption_column])
    renamed = {image_column: "image", caption_column: "caption"}
    data = data.rename_columns({old: new for old, new in renamed.items() if old != new})
    return data.cast_column("image", datasets.Image(mode="RGB", decode=False))


class CaptionDataset(Dataset[Caption]):
    """Captions as token ids with their images, bad ones replaced.

    An unreadable image or an empty caption is replaced by a sample that depends only on the
    bad one's row, so it is the same on every worker and rank, and it is reported with the
    sample.

    Args:
        data: Columns ``image`` (not decoded) and ``caption``.
        encode: Captions to token ids, e.g. ``HiveProcessor.encode_captions``.
    """

    def __init__(
        self, data: datasets.Dataset, encode: Callable[[Sequence[str]], list[list[int]]]
    ) -> None:
        captions = [caption if caption else "" for caption in data["caption"]]
        self.has_caption = np.array([bool(caption.strip()) for caption in captions], dtype=bool)
        if not self.has_caption.any():
            raise ValueError(f"all {len(captions)} captions are empty")
        token_ids = encode(captions)
        self.lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self._token_ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in token_ids])
        self._images = data.select_columns(["image"])
        self._decoder = datasets.Image(mode="RGB")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Caption:
        """Read sample ``index``, or its replacement.

        Raises:
            ValueError: If not even one of 100 replacements can be used.
        """
        bad: list[tuple[int, str, str]] = []
        replacements = np.random.default_rng(index)
        candidate = int(index)
        for _ in range(100):
            stored = self._images[candidate]["image"]
            try:
                if not self.has_caption[candidate]:
                    raise ValueError("empty caption")
                if stored is None:
                    raise ValueError("no image")
                image = self._decoder.decode_example(stored)
            except Exception as error:  # noqa: BLE001  a damaged file can make a decoder raise any
                source = (stored or {}).get("path") or f"row {candidate}"
                reason = (
                    "cannot identify image"
                    if isinstance(error, UnidentifiedImageError)
                    else str(error)
                )
                bad.append((candidate, source, f"{type(error).__name__}: {reason}"))
                candidate = int(replacements.integers(len(self)))
                continue
            first, last = self._offsets[candidate : candidate + 2]
            return Caption(
                image=image,
                input_ids=self._token_ids[first:last].tolist(),
                sample_id=candidate,
                bad_samples=[BadSample(*entry, replaced_by=candidate) for entry in bad],
            )
        raise ValueError(
            f"sample {index} and 99 replacements cannot be used; the last one: {bad[-1][2]}"
        )
