"""Captions as token ids with their images, and what happens to samples that cannot be used."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypedDict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hive_vision.data.features import DistinctImages, FeatureStore
from hive_vision.data.images import ImageStore, UnusableImageError, decode_image
from hive_vision.data.replacement import BadSample, ReplacingDataset, UnusableSampleError
from hive_vision.data.sampler import OrderedPart
from hive_vision.data.sources import CaptionSource, combine_fingerprints

MIN_HELD_OUT = 32  # fewer say little, and one cannot be given another one's image
SPLIT_SEED = 0  # the held-out part is the same for every method and run seed
_TOKEN_FORMAT = "1"  # change it with what is stored: old files are cached on users' disks

Encode = Callable[[Sequence[str]], list[list[int]]]


class Caption(TypedDict):
    """One training sample: an image and ``<start> caption <end>`` as token ids.

    The image is in RGB, or its features (S, N, D) where they are stored.
    """

    image: Image.Image | Tensor
    input_ids: list[int]
    sample_id: int
    bad_samples: list[BadSample]


def split_held_out(source: CaptionSource, holdout: float) -> tuple[CaptionSource, CaptionSource]:
    """Split off held-out images with all their captions, always the same ones.

    Args:
        source: What to split.
        holdout: Share of the images to split off; of small sets more, up to 32 or a fifth.

    Returns:
        Training part in the order of the source, and held-out part in a random order.

    Raises:
        ValueError: If there are not enough images.
    """
    if len(source) < 2:
        raise ValueError(
            f"{source.name!r} has {len(source)} images; at least 2 are needed, one of them is "
            "held out"
        )
    size = max(1, round(holdout * len(source)), min(MIN_HELD_OUT, len(source) // 5))
    if size >= len(source):
        raise ValueError(f"holdout is {holdout}, which leaves no images to learn from")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(source))
    return source.select_images(np.sort(order[size:])), source.select_images(order[:size])


class CaptionDataset(ReplacingDataset[Caption]):
    """The pairs of some sources as samples, bad ones replaced.

    Bad is an unreadable image or an empty caption. Token ids are made once and then read from disk
    where they are needed.

    Args:
        sources: Images with captions; P pairs together.
        encode: Captions to token ids, e.g. ``HiveProcessor.encode_captions``.
        weights: Passes over each source in an epoch; one each if not given.
        sample_ids: (P,) what to call the samples in reports; their rows if not given.
        encoding: Identifies ``encode``, so that token ids of earlier runs can be used again;
            if not given they are made anew and kept in memory.
        group_captions: The order keeps captions of an image together, and samples that follow each
            other share one image object, read once.

    Attributes:
        fingerprint: Changes with the sources.
    """

    def __init__(
        self,
        sources: Sequence[CaptionSource],
        encode: Encode,
        *,
        weights: Sequence[float] | None = None,
        sample_ids: NDArray[np.int64] | None = None,
        encoding: str | None = None,
        group_captions: bool = False,
    ) -> None:
        sizes = [len(source.captions) for source in sources]
        self._first_rows = np.cumsum([0, *sizes]).tolist()
        self.has_caption = np.concatenate([_has_text(source) for source in sources])
        if not self.has_caption.any():
            raise ValueError(f"all {len(self)} captions are empty")
        self.fingerprint = combine_fingerprints(*(source.fingerprint for source in sources))
        self._images = [source.images for source in sources]
        self._image_rows = np.concatenate([s.rows[s.image_rows] for s in sources])
        self._sample_ids = np.arange(len(self)) if sample_ids is None else sample_ids
        self._tokens = [_tokenize(source, encode, encoding) for source in sources]
        self.lengths: NDArray[np.int64] = np.concatenate(
            [
                pc.list_value_length(tokens.data.column("input_ids")).to_numpy().astype(np.int64)
                for tokens in self._tokens
            ]
        )
        self.parts = [
            OrderedPart(
                len(source.captions),
                weight,
                _shards_of_pairs(source),
                source.image_rows if group_captions else None,
            )
            for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
        ]
        self._group_captions = group_captions
        self._last_image: tuple[tuple[int, int], Image.Image | Tensor] | None = None
        self._features: FeatureStore | None = None
        self._first_feature = 0

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token ids behind; their tables travel as the names of their files."""
        state = {key: value for key, value in self.__dict__.items() if key != "_token_ids"}
        return {**state, "_last_image": None}

    @cached_property
    def _token_ids(self) -> list[pa.ChunkedArray]:
        return [tokens.data.column("input_ids") for tokens in self._tokens]

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch, with the weights of the sources."""
        return sum(part.per_epoch for part in self.parts)

    @cached_property
    def distinct_images(self) -> DistinctImages:
        """The images of all samples."""
        return DistinctImages(self._images, np.split(self._image_rows, self._first_rows[1:-1]))

    @property
    def images_per_sample(self) -> float:
        """How many images are encoded for a sample, on average."""
        return len(self.distinct_images) / len(self) if self._group_captions else 1.0

    def with_features(self, store: FeatureStore, first: int) -> Self:
        """Give the same samples with features from a store for images.

        Args:
            store: Has them.
            first: Its row with the first of ``distinct_images``.
        """
        data = copy(self)
        data._features, data._first_feature, data._last_image = store, first, None
        return data

    def read(self, row: int, bad: list[UnusableSampleError]) -> Caption:
        """Read a sample that takes the place of those that could not be used."""
        part = bisect_right(self._first_rows, row) - 1
        images, image_row = self._images[part], int(self._image_rows[row])
        sample_id = int(self._sample_ids[row])
        try:
            if not self.has_caption[row]:
                raise UnusableImageError("empty caption")
            image = self._read_image(part, image_row)
        except (UnusableImageError, OSError) as error:
            raise UnusableSampleError(sample_id, _place(images, image_row), str(error)) from error
        tokens = self._token_ids[part][row - self._first_rows[part]]
        return Caption(
            image=image,
            input_ids=tokens.as_py(),
            sample_id=sample_id,
            bad_samples=[error.replaced_by(sample_id) for error in bad],
        )

    def _read_image(self, part: int, row: int) -> Image.Image | Tensor:
        """Read an image or its features, unless it is that of the sample before."""
        if self._last_image is not None and self._last_image[0] == (part, row):
            return self._last_image[1]
        image: Image.Image | Tensor
        if self._features is None:
            image = decode_image(self._images[part].read(row))
        else:
            number = self.distinct_images.number(part, row)
            image = self._features.read(self._first_feature + number)
        if self._group_captions:
            self._last_image = (part, row), image
        return image

    def with_images_of(self, row: int, other: int) -> Caption:
        """Give a sample with another one's image."""
        return {**self[row], "image": self[other]["image"]}


def _place(images: ImageStore, row: int) -> str:
    """Say where an image lies, as exactly as can be read."""
    try:
        return images.read(row)["path"] or images.name(row)
    except (UnusableImageError, OSError):
        return images.name(row)


def _has_text(source: CaptionSource) -> NDArray[np.bool_]:
    stripped = pc.utf8_trim_whitespace(pc.fill_null(source.captions, ""))
    has_text: NDArray[np.bool_] = pc.not_equal(stripped, "").to_numpy()
    return has_text


def _shards_of_pairs(source: CaptionSource) -> NDArray[np.int64] | None:
    return None if source.shards is None else source.shards[source.image_rows]


def _tokenize(source: CaptionSource, encode: Encode, encoding: str | None) -> datasets.Dataset:
    """Make token ids of a source's captions, or find those that an earlier run has made."""
    cache_file = None
    if encoding is not None:
        key = combine_fingerprints(_TOKEN_FORMAT, source.fingerprint, encoding)
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hive-vision"
        folder.mkdir(parents=True, exist_ok=True)
        cache_file = str(folder / f"tokens-{key}.arrow")
    return source.pairs.map(
        lambda batch: {"input_ids": encode([caption or "" for caption in batch["caption"]])},
        batched=True,
        remove_columns=["image_row", "caption"],
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        cache_file_name=cache_file,
        load_from_cache_file=cache_file is not None,
        new_fingerprint=source.fingerprint,
        desc="tokenizing captions",
    )
