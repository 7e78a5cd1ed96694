"""What a frozen encoder says about images: computed once, then read from disk.

Shapes: M images, B of them at once, N tokens of one image, D encoder width.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from hive_vision.data.classification import LabelledImages
from hive_vision.data.parallel import row_ranges, work_through
from hive_vision.data.sources import hash_parts
from hive_vision.folders import acquire, write_json, written_aside
from hive_vision.models.backbones import (
    Source,
    capture_block_outputs,
    find_blocks,
    hash_tensors,
    image_token_counts,
    load_vision_model,
)
from hive_vision.models.pixels import SplitProcessor
from hive_vision.models.probes import masked_mean
from hive_vision.models.processing import load_image_processor

Pooling = Literal["mean", "cls", "head", "tokens"]
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")  # what models call its weight
_FORMAT = 1  # change it with what is stored: old features are cached on users' disks


@dataclass(frozen=True)
class Reading:
    """What is read of an encoder.

    Attributes:
        layer: l, from 1; F_l is what leaves block l, before any final norm.
        pooling: ``mean`` of the tokens; ``cls``, the first prefix token; ``head``, the encoder's
            own pooling head, which pre-training does not touch; or all ``tokens``.
        keep_prefix: Whether prefix tokens (CLS, registers) are among the tokens.
    """

    layer: int
    pooling: Pooling = "mean"
    keep_prefix: bool = False


@dataclass(frozen=True, eq=False)
class Features:
    """Features of M images.

    Attributes:
        values: (M, D) float32, or of all tokens (M, N, D) float16; memory-mapped.
        mask: (M, N) true where a token is none of padding; ``None`` where there is no padding.
    """

    values: NDArray[np.floating[Any]]
    mask: NDArray[np.bool_] | None = None


class FrozenEncoder:
    """An encoder in evaluation mode with its image processor.

    Args:
        name: What to call it.
        model: The plain vision encoder.
        image_processor: Its image processor.
        precision: ``float32``, or ``bfloat16`` for autocast.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        image_processor: Any,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.image_processor = image_processor
        self.pixels = SplitProcessor(image_processor)
        self.precision = precision
        self.depth: int = model.config.num_hidden_layers
        self.width: int = model.config.hidden_size
        self.blocks = find_blocks(model, self.depth)
        _, self.prefix_tokens = image_token_counts(model.config)

    @classmethod
    def load(cls, source: Source, **options: Any) -> Self:
        """Load a folder or hub id; of a dual encoder (CLIP, SigLIP) the vision half.

        Raises:
            ValueError: If it cannot be loaded, or has no image processor.
        """
        model = load_vision_model(source, needs_pooler=False)
        return cls(str(source), model, load_image_processor(source), **options)

    @cached_property
    def digest(self) -> str:
        """Hash of weights, configuration, preprocessing and precision."""
        volatile = ("transformers_version", "_name_or_path", "dtype", "architectures")
        facts = {
            "config": self.model.config.to_dict(),
            "preprocessing": self.image_processor.to_dict(),
            "precision": self.precision,
            "weights": hash_tensors(dict(self.model.state_dict())),
        }
        for name in volatile:
            facts["config"].pop(name, None)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def layer(self, given: int | Literal["last", "penultimate"]) -> int:
        """Turn a name of a layer into its number.

        Raises:
            ValueError: If there is no such layer.
        """
        names = {"last": self.depth, "penultimate": self.depth - 1}
        layer = names[given] if isinstance(given, str) else given
        if not 1 <= layer <= self.depth:
            raise ValueError(
                f"layer is {given!r}; {self.name!r} has layers 1 to {self.depth}: give one of "
                "them, last or penultimate"
            )
        return layer

    def check(self, reading: Reading) -> None:
        """Refuse what this encoder cannot give.

        Raises:
            ValueError: If it has no prefix token or no pooling head, or not at that layer.
        """
        self.layer(reading.layer)
        # Prefix tokens alone may be registers.
        has_cls = any(name.rpartition(".")[2] in CLASS_TOKENS for name in self.model.state_dict())
        if reading.pooling == "cls" and not (self.prefix_tokens and has_cls):
            raise ValueError(
                f"pooling is cls but {self.name!r} has no class token; use pooling=mean"
            )
        if reading.pooling == "head" and reading.layer != self.depth:
            raise ValueError(
                f"pooling is head but layer is {reading.layer}; the pooling head reads the last "
                "layer: use layer=last, or pooling=mean"
            )

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Any], readings: Sequence[Reading]) -> list[Tensor]:
        """Run the encoder once.

        Args:
            inputs: What the image processor or ``pixels`` gave for B images.
            readings: What to read.

        Returns:
            For each reading (B, D), or (B, N, D) of all tokens; float32.

        Raises:
            ValueError: If the encoder has no pooling head but is asked for it, or what it gives is
                not finite.
        """
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs = self.pixels.normalize(inputs)
        layers = [reading.layer for reading in readings]
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"),
            capture_block_outputs(self.blocks, layers) as outputs,
        ):
            output = self.model(**inputs)
        mask = self.mask(inputs)
        values = [self._pool(reading, outputs, output, mask) for reading in readings]
        if not all(torch.isfinite(value).all() for value in values):
            raise ValueError(
                f"features of {self.name!r} are not finite; check its weights"
                + (", or use precision=float32" if self.precision == "bfloat16" else "")
            )
        return values

    def mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Say which tokens are none of padding, (B, N); ``None`` if there is no padding."""
        mask = inputs.get("pixel_attention_mask")
        return None if mask is None else mask.bool()

    def _pool(
        self, reading: Reading, outputs: Mapping[int, Tensor], output: Any, mask: Tensor | None
    ) -> Tensor:
        if reading.pooling == "head":
            pooled = output.get("pooler_output")
            if pooled is None:
                raise ValueError(f"pooling is head but {self.name!r} has none; use pooling=mean")
            return pooled.float()  # type: ignore[no-any-return]
        tokens = outputs[reading.layer].float()
        if reading.pooling == "cls":
            return tokens[:, 0]
        if not reading.keep_prefix:
            tokens = tokens[:, self.prefix_tokens :]
        elif mask is not None:
            mask = torch.nn.functional.pad(mask, (self.prefix_tokens, 0), value=True)
        return tokens if reading.pooling == "tokens" else masked_mean(tokens, mask)


@dataclass(frozen=True)
class Prepare:
    """Decodes and preprocesses ranges of images.

    Attributes:
        images: Gives a decoded image for each row.
        image_processor: The encoder's.
    """

    images: Any
    image_processor: Any

    def __call__(self, rows: range) -> BatchFeature:
        """Prepare the images of some rows."""
        images = [self.images[row] for row in rows]
        return self.image_processor(images, return_tensors="pt")


def read_features(
    encoder: FrozenEncoder,
    images: LabelledImages,
    readings: Sequence[Reading],
    cache: Path,
    batch_size: int = 128,
    workers: int = 1,
) -> list[Features]:
    """Give features from the cache; what is not there is computed in one pass and kept.

    An entry is named by a hash of weights, preprocessing, precision, data and reading, and appears
    whole or not at all.

    Args:
        encoder: The encoder.
        images: M images.
        readings: What to read.
        cache: Folder of all cached features.
        batch_size: Images at once.
        workers: Processes that decode and preprocess; with one, this one does.

    Returns:
        One for each reading.

    Raises:
        ValueError: If an image cannot be decoded, a reading is impossible, or the disk has no room.
    """
    for reading in readings:
        encoder.check(reading)
    folders = {
        reading: cache / _key(encoder, images, reading) for reading in dict.fromkeys(readings)
    }
    if not all(folder.is_dir() for folder in folders.values()):
        cache.mkdir(parents=True, exist_ok=True)
        with acquire(
            cache
            / f".{hash_parts(encoder.digest.encode(), images.fingerprint.encode())[:16]}.lock",
            f"another process computes features of {encoder.name!r} on {images.name} right now; "
            "wait for it",
        ):
            # Looked at here: that other process may just have ended.
            missing = {
                reading: folder for reading, folder in folders.items() if not folder.is_dir()
            }
            if missing:
                _compute(encoder, images, missing, batch_size, workers)
    return [_load(folders[reading]) for reading in readings]


def _key(encoder: FrozenEncoder, images: LabelledImages, reading: Reading) -> str:
    facts = [_FORMAT, encoder.digest, images.fingerprint, asdict(reading)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _load(folder: Path) -> Features:
    mask = folder / "mask.npy"
    return Features(
        np.load(folder / "features.npy", mmap_mode="r"),
        np.load(mask, mmap_mode="r") if mask.is_file() else None,
    )


def _compute(
    encoder: FrozenEncoder,
    images: LabelledImages,
    missing: Mapping[Reading, Path],
    batch_size: int,
    workers: int,
) -> None:
    ranges = row_ranges(len(images), batch_size)
    batches = work_through(
        Prepare(images, encoder.pixels), ranges, workers, f"reading {images.name}"
    )
    readings = list(missing)
    with ExitStack() as stack:
        writers: list[_Writer] = []
        for rows, inputs in zip(ranges, batches, strict=True):
            values = encoder.read(inputs, readings)
            if not writers:
                _check_room(next(iter(missing.values())).parent, len(images), values)
                for (reading, folder), first in zip(missing.items(), values, strict=True):
                    facts = {"encoder": encoder.name, "data": images.name, **asdict(reading)}
                    aside = stack.enter_context(written_aside(folder))
                    write_json(aside / "features.json", facts)
                    writers.append(_Writer(aside, len(images), first))
            for writer, value in zip(writers, values, strict=True):
                writer.write(rows, value, encoder.mask(inputs))
        for writer in writers:
            writer.values.flush()


def _check_room(cache: Path, count: int, firsts: Sequence[Tensor]) -> None:
    """Refuse to fill a disk: memory-mapped files take their room only as they are written.

    Raises:
        ValueError: If the features of all readings together do not fit.
    """
    needed = sum(
        count * math.prod(first.shape[1:]) * _stored_type(first).itemsize for first in firsts
    )
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise ValueError(
            f"features of {count:,} images need {needed / 1e9:.1f} GB in {cache} and "
            f"{free / 1e9:.1f} GB are free; give cache=FOLDER on another disk, or "
            "protocol=paper, which keeps none"
        )


def _stored_type(values: Tensor) -> np.dtype[Any]:
    return np.dtype(np.float32 if values.dim() == 2 else np.float16)


class _Writer:
    """Fills the arrays of one entry of the cache."""

    def __init__(self, folder: Path, count: int, first: Tensor) -> None:
        self.folder = folder
        self.count = count
        self.values = np.lib.format.open_memmap(
            folder / "features.npy", "w+", _stored_type(first), (count, *first.shape[1:])
        )
        self.mask: NDArray[np.bool_] | None = None

    def write(self, rows: range, values: Tensor, mask: Tensor | None) -> None:
        """Write the features of some images."""
        self.values[rows.start : rows.stop] = values.to(
            torch.float32 if self.values.dtype == np.float32 else torch.float16
        ).cpu()
        if not np.isfinite(self.values[rows.start : rows.stop]).all():
            raise ValueError(
                f"features of images {rows.start} to {rows.stop - 1} are too large for float16, in "
                "which tokens are kept; use protocol=paper, which keeps none"
            )
        if mask is not None and values.dim() == 3:
            if self.mask is None:
                self.mask = np.lib.format.open_memmap(
                    self.folder / "mask.npy", "w+", np.dtype(bool), (self.count, mask.shape[1])
                )
            self.mask[rows.start : rows.stop] = mask.cpu()
