"""While the encoder is frozen, its features of an image stay the same: kept on the disk.

Shapes: I images, S layers that are read, N tokens, D encoder width.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from hive_vision.analysis.devices import find_device
from hive_vision.data.features import DistinctImages, FeatureStore, row_bytes
from hive_vision.data.images import UnusableImageError
from hive_vision.data.parallel import row_ranges, work_through
from hive_vision.data.sources import combine_fingerprints
from hive_vision.folders import read_json, write_json
from hive_vision.models.backbones import backbones_of, blank_image, has_any_size, hash_tensors
from hive_vision.models.pixels import SplitProcessor
from hive_vision.training.arguments import RunArguments, StageArguments
from hive_vision.training.errors import TrainingError
from hive_vision.training.hardware import is_sharded, precision_on
from hive_vision.training.processes import LONGEST_WAIT, on_main
from hive_vision.training.run_data import RunData
from hive_vision.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

# Assumed, not measured: a plain SATA SSD. Disks of laptops are about as fast; what the operating
# system keeps in memory is read far faster, which only makes the estimate careful.
DISK_BYTES_PER_SECOND = 0.5e9
DISK_SHARE = 0.5  # of the free room, at most: checkpoints need some, too
WORTHWHILE_SECONDS = 60.0  # less is not worth other last bits
SLOWEST = 1e9  # operations per second of any machine: what saves nothing there needs no measuring
NOTE = "feature_cache.json"  # in a stage's folder: what was decided, so that a later start agrees


@dataclass(frozen=True)
class CacheEstimate:
    """What keeping features costs and saves.

    Args:
        images: Different ones.
        reads: How often one is encoded where nothing is kept.
        image_seconds: To encode one.
        image_bytes: Its features.
        free_bytes: Room on the disk.
        processes: That share the work where nothing is kept; one fills the cache.
    """

    images: int
    reads: float
    image_seconds: float
    image_bytes: int
    free_bytes: int
    processes: int = 1

    @property
    def saved_seconds(self) -> float:
        """What is left of the saved time when features were made, written and read."""
        moving = self.image_bytes / DISK_BYTES_PER_SECOND
        plain = self.reads * self.image_seconds / self.processes
        return plain - self.images * (self.image_seconds + moving) - self.reads * moving

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.images * self.image_bytes <= DISK_SHARE * self.free_bytes

    @property
    def pays(self) -> bool:
        """Whether features are worth being kept."""
        return self.fits and self.saved_seconds > WORTHWHILE_SECONDS

    def __str__(self) -> str:
        """All numbers in a line."""
        return (
            f"{self.images:,} images, encoded {self.reads:,.0f} times without, features of "
            f"{_size(self.images * self.image_bytes)} with {_size(self.free_bytes)} free (half of "
            f"that may be used), {self.saved_seconds:+,.0f} s saved at {self.image_seconds:.2g} s "
            f"an image and {_size(DISK_BYTES_PER_SECOND)}/s"
        )


def reads_features(stage: Path) -> bool:
    """Whether a stage of a run, given by its folder, reads kept features instead of images."""
    note = read_json(stage / NOTE)
    return note is not None and bool(note["is_used"])


class FeatureCache:
    """Gives the stages that freeze the encoder its features instead of images.

    The first of them computes the features of all images in one pass, which can be interrupted.

    Args:
        arguments: The recipe.
        folder: For the features.
        pixels: Prepares images.
        watchdog: Is told what begins.
    """

    def __init__(
        self, arguments: RunArguments, folder: Path, pixels: SplitProcessor, watchdog: Watchdog
    ) -> None:
        self.arguments = arguments
        self.folder = folder
        self.pixels = pixels
        self.watchdog = watchdog

    def data_of(
        self,
        model: PreTrainedModel,
        data: RunData[Any],
        stages: Sequence[StageArguments],
        folder: Path,
    ) -> RunData[Any]:
        """Give a stage's data with features for images, where the recipe says so or it pays.

        All processes call it; the main one does the work.

        Args:
            model: Its encoder is frozen.
            data: Of the stage.
            stages: It and those behind it that read the same data through the same encoder.
            folder: Of the stage.

        Raises:
            ValueError: If the recipe wants what is not possible.
        """
        if self.arguments.cache_features == "never":
            return data
        self.watchdog.pause("looking at the encoder's features")
        store = on_main(lambda: self._open(model, data, stages, folder / NOTE))
        while store is not None and not store.is_complete:
            store = on_main(partial(self._fill, store, model, data))
        return data if store is None else data.with_features(store)

    def remove(self) -> None:
        """Delete the features, if there are any; the main process calls it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
            logger.info("features in %s are not needed any more: removed", self.folder)

    def _open(
        self,
        model: PreTrainedModel,
        data: RunData[Any],
        stages: Sequence[StageArguments],
        note: Path,
    ) -> FeatureStore | None:
        """Decide, once for each stage; the store if features are kept."""
        noted, always = read_json(note), self.arguments.cache_features == "always"
        if noted is not None and not noted["is_used"] and not always:
            return None
        images = sum(len(part.distinct_images) for part in (data.train, data.held_out))
        reads = sum(_reads(stage, data, self.arguments.evaluate_every) for stage in stages)
        if always or noted is not None or reads > images:
            is_used, store, why = self._judge(model, data, images, reads, noted is not None)
        else:  # so little that nothing needs to be measured
            why = f"{reads:,.0f} images are encoded without, {images:,} with it"
            is_used, store = False, None
        logger.info("features of images are %s: %s", "kept" if is_used else "not kept", why)
        write_json(note, {"is_used": is_used, "why": why})
        return store if is_used else None

    def _judge(
        self, model: PreTrainedModel, data: RunData[Any], images: int, reads: float, is_noted: bool
    ) -> tuple[bool, FeatureStore | None, str]:
        always = self.arguments.cache_features == "always"
        obstacle, shape = self._look_at(model)
        if obstacle:
            if always:
                raise ValueError(f"cache_features is always, but {obstacle}; use auto or never")
            return False, None, obstacle
        precision = self._precision
        dtype = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
        fingerprint = _fingerprint(model, self.pixels, data, precision)
        store = FeatureStore(self.folder, fingerprint, images, shape, dtype)
        if store.is_complete:
            return True, store, f"those of all {images:,} are there"
        vision, _ = backbones_of(model)
        operations = 2 * sum(p.numel() for p in vision.parameters()) * shape[1]
        if not (always or is_noted) and reads * operations / SLOWEST <= WORTHWHILE_SECONDS:
            return False, None, f"{reads:,.0f} images are encoded in no time"
        device = find_device(None, precision)
        estimate = CacheEstimate(
            images,
            reads,
            operations / (device.flops_per_second * device.share),
            row_bytes(shape, dtype),
            store.free_bytes(),
            PartialState().num_processes,
        )
        if always and not is_noted and not estimate.fits:
            raise ValueError(
                f"cache_features is always, but half of the free disk is too little ({estimate}); "
                "make room or use never"
            )
        return always or is_noted or estimate.pays, store, str(estimate)

    @property
    def _precision(self) -> torch.dtype:
        return precision_on(PartialState().device.type, self.arguments.precision)

    def _autocast(self) -> AbstractContextManager[None]:
        device, precision = PartialState().device, self._precision
        return torch.autocast(device.type, precision, enabled=precision != torch.float32)

    @torch.no_grad()
    def _look_at(self, model: PreTrainedModel) -> tuple[str, tuple[int, ...]]:
        """Find out why features cannot be kept, if so, and their shape (S, N, D)."""
        if is_sharded(self.arguments):
            return "with sharding=fsdp2 no process has the whole encoder", ()
        vision, _ = backbones_of(model)
        if has_any_size(vision.config):
            return "images of this encoder have different numbers of tokens", ()
        device, was_training = PartialState().device, vision.training
        model.to(device)
        blank = blank_image(vision.config).to(device)
        with torch.random.fork_rng(), self._autocast():
            before = _random_state(device)
            vision.train()
            trained = model.encode_images(blank)
            # Dropout, drop path and jitter draw numbers; no encoder needs to be known by name.
            draws = not torch.equal(before, _random_state(device))
            vision.eval()
            features = model.encode_images(blank)
        vision.train(was_training)
        if draws or not torch.allclose(trained, features, rtol=1e-2, atol=1e-2):
            return "this encoder drops or changes features at random while it trains", ()
        return "", tuple(features.shape[1:])

    def _fill(
        self, store: FeatureStore, model: PreTrainedModel, data: RunData[Any]
    ) -> FeatureStore:
        """Compute features for a while; all of them where nobody waits.

        Raises:
            TrainingError: If they cannot be written.
        """
        end = time.monotonic() + _patience()
        vision, _ = backbones_of(model)
        was_training = vision.training
        model.to(PartialState().device)
        vision.eval()
        ranges = row_ranges(store.count, self.arguments.micro_batch_size)
        ranges = [
            range(max(store.done, rows.start), rows.stop)
            for rows in ranges
            if rows.stop > store.done
        ]
        prepare = _Prepare((data.train.distinct_images, data.held_out.distinct_images), self.pixels)
        results = work_through(prepare, ranges, max(1, data.num_workers), "features of images")
        try:
            try:
                for pixels, reasons in results:
                    self.watchdog.progress(f"computing features, behind image {store.done}")
                    store.append(self._encode(model, pixels, reasons, store), reasons)
                    if time.monotonic() > end:
                        break
            finally:
                store.save()
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"features could not be written to {self.folder} ({reason}); make room and run the "
                "same command again, or add cache_features=never"
            ) from error
        finally:
            vision.train(was_training)
        self.watchdog.pause("looking at the encoder's features")
        return store

    @torch.no_grad()
    def _encode(
        self,
        model: PreTrainedModel,
        pixels: Tensor | None,
        reasons: Sequence[str | None],
        store: FeatureStore,
    ) -> Tensor:
        """Features (I, S, N, D) of images, of which those without a reason have pixels."""
        features = torch.zeros(len(reasons), *store.shape, dtype=store.dtype)
        if pixels is not None:
            inputs = self.pixels.normalize({"pixel_values": pixels.to(PartialState().device)})
            with self._autocast():
                found = model.encode_images(inputs["pixel_values"])
            is_good = torch.tensor([reason is None for reason in reasons])
            features[is_good] = found.to(store.dtype).cpu()
        return features


@dataclass(frozen=True)
class _Prepare:
    """Reads images of several data sets by their number among all; runs in workers."""

    parts: Sequence[DistinctImages]
    pixels: SplitProcessor

    def __call__(self, rows: range) -> tuple[Tensor | None, list[str | None]]:
        images, reasons = [], []
        for row in rows:
            reason = None
            try:
                images.append(self._decode(row))
            except (UnusableImageError, OSError) as error:
                reason = str(error)
            reasons.append(reason)
        return (self.pixels(images)["pixel_values"] if images else None), reasons

    def _decode(self, row: int) -> Any:
        first, second = self.parts
        return first.decode(row) if row < len(first) else second.decode(row - len(first))


def _reads(stage: StageArguments, data: RunData[Any], evaluate_every: int) -> float:
    """Images that a stage encodes: in its steps, and in held-out losses, two of them after it."""
    steps = stage.steps(data.samples)
    losses = 2 + (steps // evaluate_every if evaluate_every else 0)
    return float(
        steps * stage.batch_size * data.train.images_per_sample
        + losses * len(data.held_out) * data.held_out.images_per_sample
    )


def _fingerprint(
    model: PreTrainedModel, pixels: SplitProcessor, data: RunData[Any], precision: torch.dtype
) -> str:
    """Identify everything that decides the features of a run's images, and their order."""
    vision, _ = backbones_of(model)
    config = {
        key: value
        for key, value in vision.config.to_dict().items()
        # Of where it came from, and no matter to what it computes.
        if key not in ("_name_or_path", "architectures", "dtype", "transformers_version")
    }
    if model.config.model_type == "llava":
        read = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    else:
        read = tuple(sorted(set(model.config.encoder_layers)))
    facts = [config, read, pixels.image_processor.to_dict(), hash_tensors(vision.state_dict())]
    written = json.dumps([*facts, str(precision)], sort_keys=True, default=str)
    return combine_fingerprints(written, data.train.fingerprint, data.held_out.fingerprint)


def _patience() -> float:
    """Seconds after which others that wait inside a collective operation have to hear something."""
    return math.inf if PartialState().num_processes == 1 else LONGEST_WAIT.total_seconds() / 6


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
