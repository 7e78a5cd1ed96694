"""What a recipe becomes on the machine at hand: micro-batches, precision, arguments."""

import ctypes
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments

from hive_vision.models.backbones import backbones_of, blocks_of
from hive_vision.models.cpu_attention import CPU_ATTENTION
from hive_vision.training.arguments import Precision, RunArguments, StageArguments
from hive_vision.training.checkpoints import KEPT
from hive_vision.training.processes import LONGEST_WAIT
from hive_vision.training.stages import parameter_groups, spare_vision_tail

_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def split_batch(batch_size: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """Split a global batch over devices and accumulation steps.

    Args:
        batch_size: Captions for one optimiser step.
        micro_batch_size: At most so many at once on a device.
        world_size: Number of processes.

    Returns:
        Micro-batch size and accumulation steps; their product times ``world_size`` is exactly
        ``batch_size``.

    Raises:
        ValueError: If the devices do not divide the batch.
    """
    if batch_size % world_size:
        raise ValueError(
            f"batch_size is {batch_size} but there are {world_size} processes; "
            "make it a multiple of them"
        )
    share = batch_size // world_size
    micro = next(m for m in range(min(micro_batch_size, share), 0, -1) if share % m == 0)
    return micro, share // micro


def training_arguments(
    arguments: RunArguments,
    stage: StageArguments,
    folder: Path,
    steps: int,
    sharded_classes: list[str],
    num_workers: int,
) -> TrainingArguments:
    """Translate a stage of a recipe into transformers' arguments.

    Args:
        arguments: The recipe.
        stage: One of its stages.
        folder: The stage's folder.
        steps: Its optimiser steps.
        sharded_classes: Modules that are gathered as a whole when the model is sharded.
        num_workers: Processes that read images beside the trainer.
    """
    micro, accumulation = split_batch(
        stage.batch_size, arguments.micro_batch_size, PartialState().num_processes
    )
    precision = precision_on(this_device(), arguments.precision)
    sharded = is_sharded(arguments)
    sharding = {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "transformer_layer_cls_to_wrap": sharded_classes,
    }
    return TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        ddp_timeout=round(LONGEST_WAIT.total_seconds()),
        seed=arguments.seed,
        data_seed=arguments.seed,
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        bf16=precision == torch.bfloat16,
        fp16=precision == torch.float16,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        warmup_steps=stage.warmup,
        logging_steps=arguments.log_every,
        logging_nan_inf_filter=arguments.faults.on_divergence != "stop",
        eval_strategy="steps" if arguments.evaluate_every else "no",
        eval_steps=arguments.evaluate_every or None,
        save_strategy="steps",
        save_steps=arguments.save_every or steps,
        save_total_limit=KEPT,
        # Every trainable parameter gets a gradient in every step: what no loss reaches is frozen.
        ddp_find_unused_parameters=False,
        fsdp=True if sharded else None,
        fsdp_config=sharding if sharded else None,
    )


def this_device() -> str:
    """Kind of the device that trains here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision_on(device: str, given: Precision) -> torch.dtype:
    """What products are computed in.

    Args:
        device: ``cuda`` or ``cpu``; a GPU that is not here is taken for a recent one.
        given: Of the recipe.
    """
    if given != "auto":
        return _PRECISIONS[given]
    if device == "cuda":
        has_bfloat16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    else:  # AVX-512's instructions alone are slower than float32 (docs/log.md)
        has_bfloat16 = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def prepare_model(
    model: PreTrainedModel, arguments: RunArguments, groups: Mapping[str, str] | None = None
) -> None:
    """Choose how a model computes, as the recipe says; its loss and gradients stay the same.

    What nobody reads of the encoder is spared, so its own outputs mean nothing afterwards.

    Args:
        model: To train.
        arguments: The recipe: ``attention``, ``gradient_checkpointing``, ``compile`` and
            ``keep_freed_memory``.
        groups: What ``parameter_groups`` gave, where it was asked before.

    Raises:
        ValueError: If transformers has no such attention, or not for this model.
    """
    attention = arguments.attention
    if attention != "auto":
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"attention is {attention!r}, which is not available here ({reason}); use auto, "
                "sdpa or eager"
            ) from error
    elif this_device() == "cpu":
        parts = (model, *backbones_of(model))
        if {part.config._attn_implementation for part in parts} == {"sdpa"}:
            model.set_attn_implementation(CPU_ATTENTION)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # It lets what leaves the embeddings need gradients, those of a frozen encoder too.
        model.disable_input_require_grads()
    if arguments.compile:
        for block in blocks_of(model):
            block.compile()
    spare_vision_tail(model, parameter_groups(model) if groups is None else groups)
    if arguments.keep_freed_memory and this_device() == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let this process keep what it frees, instead of handing it back to the system.

    Every step frees gradients and activations and asks for as many bytes again. By default glibc
    returns large blocks to the system at once, which hands them out again page by page, each
    filled with zeros. It stays so until the process ends. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0)  # no block is a mapping of its own
    mallopt(trim_threshold, -1)  # the heap never shrinks


def is_sharded(arguments: RunArguments) -> bool:
    """Whether each process holds a part of the model; one alone holds all, with any recipe."""
    return arguments.sharding == "fsdp2" and PartialState().num_processes > 1


def peak_memory() -> int:
    """Largest memory use of this process so far, in bytes: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
