"""What a recipe needs, known before it is started: memory, operations, time, devices."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hive_vision.analysis.cost_model import StageCost, stage_cost
from hive_vision.analysis.devices import USABLE_REASON, Device, find_device
from hive_vision.data.captions import CaptionDataset
from hive_vision.data.sampler import LengthBucketedSampler
from hive_vision.studies.feed import caption_processor
from hive_vision.studies.measured_steps import StepCase, measure_apart
from hive_vision.studies.recipe_model import recipe_model
from hive_vision.training.arguments import PretrainArguments, StageArguments
from hive_vision.training.hardware import precision_on, split_batch, this_device
from hive_vision.training.miniature import ensure_miniature
from hive_vision.training.run_data import load_run_data
from hive_vision.training.stages import (
    GROUPS,
    apply_rules,
    parameter_groups,
    spare_vision_tail,
)

ASSUMED_TOKENS = 16
MAX_DEVICES = 1024


@dataclass(frozen=True)
class Captions:
    """How long the captions are, start and end tokens included.

    Attributes:
        tokens: Of a caption on average, with the padding of its micro-batch.
        longest: Of the longest caption: what memory must do for.
        samples: Captions in an epoch, if known.
        source: Where the numbers come from.
    """

    tokens: float
    longest: int
    samples: int | None
    source: str


def make_plan(
    arguments: PretrainArguments,
    device: str | None = None,
    devices: int = 1,
    tokens: float | None = None,
    samples: int | None = None,
    measure: bool = False,
) -> dict[str, Any]:
    """Work out what a recipe needs, without its weights.

    Args:
        arguments: The recipe.
        device: Name of a device, ``cpu``, or that of this machine if not given.
        devices: How many of them train together.
        tokens: Length of every caption; from the data, or assumed, if not given.
        samples: Captions in an epoch, for stages given by epochs.
        measure: Correct time and memory by three real steps of each stage on this machine, with
            random weights and the longest captions.

    Returns:
        Numbers and names only, ready for JSON; see docs/scale.md.

    Raises:
        ValueError: If the recipe, the device or the backbones do not fit.
    """
    if arguments.method == "base":
        raise ValueError("method base trains nothing, so there is nothing to plan")
    if devices < 1 or (tokens is not None and tokens < 2) or (samples is not None and samples < 1):
        raise ValueError(
            f"devices is {devices}, tokens {tokens}, samples {samples}; at least 1, 2 and 1"
        )
    if measure and device is not None:
        raise ValueError(
            f"device is {device!r}, but measure=true measures this machine; leave one out"
        )
    if arguments.miniature is not None:
        ensure_miniature(arguments.miniature)
    kind = this_device() if device is None else "cpu" if device.lower() == "cpu" else "cuda"
    precision = precision_on(kind, arguments.precision)
    hardware = find_device(device, precision)
    captions = caption_lengths(arguments, tokens, samples)
    model, images, image_tokens = recipe_model(arguments)
    groups = parameter_groups(model)
    spare_vision_tail(model, groups)
    sizes = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        sizes[groups[name]] += parameter.numel()
    stages = []
    for name, stage in arguments.stages.items():
        steps = _steps(name, stage, captions.samples)
        if steps == 0:
            continue
        try:
            apply_rules(model, stage.rules, groups)
            split_batch(stage.batch_size, arguments.micro_batch_size, devices)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        cost = stage_cost(
            model,
            images,
            image_tokens=image_tokens,
            autocast=None if precision == torch.float32 else precision,
        )
        planner = _Planner(arguments, cost, hardware, devices, captions, stage, steps)
        measured = planner.measure(name) if measure else None
        if measured is not None:
            planner = planner.corrected(measured)
        stages.append({"name": name, **planner.stage(), "measured": measured})
    return {
        "method": arguments.method,
        "vision": arguments.model.vision,
        "language": arguments.model.language,
        "precision": str(precision).removeprefix("torch."),
        "sharding": arguments.sharding,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "devices": devices,
        "device": {**asdict(hardware), "memory_reason": USABLE_REASON},
        "captions": asdict(captions),
        "image_tokens_read": image_tokens,
        "parameters": {group: size for group, size in sizes.items() if size},
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
    }


def _steps(name: str, stage: StageArguments, samples: int | None) -> int:
    if stage.max_steps is None and stage.epochs is not None and samples is None:
        raise ValueError(
            f"{name} is given by epochs and the data is not here; add samples=N, or set "
            f"{name}.max_steps and {name}.epochs=null"
        )
    try:
        return stage.steps(samples or 0)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def caption_lengths(
    arguments: PretrainArguments, tokens: float | None, samples: int | None
) -> Captions:
    """Take the lengths that were given, those of the data if it is here, or assume some.

    Args:
        arguments: The recipe.
        tokens: Length of every caption, if given.
        samples: Captions in an epoch, if given.
    """
    if tokens is not None:
        return Captions(tokens, math.ceil(tokens), samples, "given")
    data = arguments.data
    if data_is_here(arguments):
        processor = caption_processor(arguments, data.max_text_tokens)
        train = load_run_data(data, processor).train
        return Captions(
            _padded_length(train, arguments),
            int(train.lengths.max()),
            samples or train.epoch_size,
            "measured on the data",
        )
    longest = data.max_text_tokens
    source = (
        f"assumed, the data or the tokenizer is not here: {ASSUMED_TOKENS} on average, as short "
        "web captions have, and for memory the longest that data.max_text_tokens allows"
    )
    return Captions(min(ASSUMED_TOKENS, longest), longest, samples, source)


def data_is_here(arguments: PretrainArguments) -> bool:
    """Whether a recipe's captions and both backbones are in local folders."""
    paths = [source.path for source in arguments.data.train_sources()]
    models = arguments.model.vision, arguments.model.language
    return all(Path(path).exists() for path in (*paths, *models))


def _padded_length(train: CaptionDataset, arguments: PretrainArguments) -> float:
    """Mean length of the longest caption of a micro-batch, in the order of training."""
    lengths = train.lengths
    batch = max(stage.batch_size for stage in arguments.stages.values())
    micro, _ = split_batch(batch, arguments.micro_batch_size, 1)
    sampler = LengthBucketedSampler(
        lengths, batch, num_batches=32, seed=arguments.seed, parts=train.parts
    )
    rows = np.concatenate(list(sampler.batches())).reshape(-1, micro)
    return float(lengths[rows].max(axis=1).mean())


@dataclass(frozen=True)
class _Planner:
    """Asks a stage's costs for what a person wants to know."""

    arguments: PretrainArguments
    cost: StageCost
    device: Device
    devices: int
    captions: Captions
    settings: StageArguments
    steps: int
    memory_factor: float = 1.0
    optimizer_seconds: float = 0.0

    def measure(self, name: str) -> dict[str, float]:
        """Time three steps on the longest captions; what was predicted stands beside it."""
        micro, _ = split_batch(
            self.settings.batch_size, self.arguments.micro_batch_size, self.devices
        )
        longest, chosen = self.captions.longest, self.arguments.gradient_checkpointing
        found = measure_apart(StepCase(self.arguments, name, micro, longest, steps=3))
        memory = self.cost.memory(micro, longest, share=micro, checkpointing=chosen)
        flops = micro * self.cost.trace(chosen).flops_per_sample(longest)
        return {
            "micro_batch": micro,
            "tokens": longest,
            "flops": flops,
            "seconds": found.forward + found.backward,
            "predicted_seconds": flops / (self.device.flops_per_second * self.device.share),
            "optimizer_seconds": found.optimizer,
            "memory": found.memory,
            "predicted_memory": memory.total,
        }

    def corrected(self, measured: Mapping[str, float]) -> "_Planner":
        """Plan with what was measured."""
        speed = measured["flops"] / measured["seconds"]
        return replace(
            self,
            device=replace(self.device, share=speed / self.device.flops_per_second),
            memory_factor=measured["memory"] / measured["predicted_memory"],
            optimizer_seconds=measured["optimizer_seconds"],
        )

    def stage(self) -> dict[str, Any]:
        """Everything about the stage."""
        settings, arguments = self.settings, self.arguments
        micro, accumulation = split_batch(
            settings.batch_size, arguments.micro_batch_size, self.devices
        )
        chosen = arguments.gradient_checkpointing
        flops = self.cost.trace(chosen).flops_per_sample(self.captions.tokens)
        total = flops * self.steps * settings.batch_size
        speed = self.device.flops_per_second * self.device.share * self.devices
        return {
            "trained_parameters": int(self.cost.trained / 4),
            "steps": self.steps,
            "warmup_steps": math.ceil(self.steps * settings.warmup),
            "batch_size": settings.batch_size,
            "micro_batch_size": micro,
            "accumulation": accumulation,
            "flops_per_caption": flops,
            "flops": total,
            "hours": (total / speed + self.steps * self.optimizer_seconds) / 3600,
            "memory": self._both(micro),
            "fits": self._fits(micro, chosen),
            "devices_needed": self._devices_needed(),
        }

    def _both(self, micro: int) -> dict[str, Any]:
        options = {"plain": False}
        if self.cost.checkpointed is not None:
            options["checkpointed"] = True
        result = {}
        for name, checkpointing in options.items():
            largest = self._largest(checkpointing)
            result[name] = {
                "at_micro_batch": self._memory(micro, checkpointing),
                "largest_micro_batch": largest,
                "at_largest": None if largest is None else self._memory(largest, checkpointing),
                "flops_per_caption": self.cost.trace(checkpointing).flops_per_sample(
                    self.captions.tokens
                ),
            }
        return result

    def _memory(self, micro: int, checkpointing: bool) -> dict[str, float]:
        memory = self.cost.memory(
            micro,
            self.captions.longest,
            share=self.settings.batch_size // self.devices,
            devices=self.devices,
            sharded=self.arguments.sharding == "fsdp2",
            checkpointing=checkpointing,
            on_cpu=self.device.kind == "cpu",
        )
        parts = {**asdict(memory), "total": memory.total}
        return {name: size * self.memory_factor for name, size in parts.items()}

    def _fits(self, micro: int, checkpointing: bool) -> bool:
        return self._memory(micro, checkpointing)["total"] <= self.device.memory

    def _largest(self, checkpointing: bool) -> int | None:
        """Largest micro-batch that fits and divides the batch."""
        share = self.settings.batch_size // self.devices
        for micro in range(share, 0, -1):
            if share % micro == 0 and self._fits(micro, checkpointing):
                return micro
        return None

    def _devices_needed(self) -> int | None:
        """Fewest devices on which the stage fits one caption at a time; sharded if more than 1."""
        chosen = self.arguments.gradient_checkpointing
        sharded = replace(self.arguments, sharding="fsdp2")
        for count in range(1, min(self.settings.batch_size, MAX_DEVICES) + 1):
            if self.settings.batch_size % count:
                continue
            if replace(self, arguments=sharded, devices=count)._fits(1, chosen):
                return count
        return None
