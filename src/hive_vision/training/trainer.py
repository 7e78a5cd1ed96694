"""The training loop: transformers' Trainer with per-group rates, our data order and our loss."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments

from hive_vision.data.captions import CaptionDataset
from hive_vision.data.collators import CaptionCollator, InstructionCollator
from hive_vision.data.instructions import InstructionDataset
from hive_vision.data.sampler import LengthBucketedSampler
from hive_vision.folders import read_json, write_json
from hive_vision.models.pixels import SplitProcessor
from hive_vision.training.bad_samples import BadSampleLog
from hive_vision.training.checkpoints import last_checkpoint, load_strictly, new_checkpoint
from hive_vision.training.divergence import DivergenceGuard
from hive_vision.training.errors import TrainingError
from hive_vision.training.held_out import Images, held_out_loss
from hive_vision.training.processes import sum_over_processes
from hive_vision.training.stages import TrainedPart
from hive_vision.training.watchdog import Watchdog

GUARD_STATE = "divergence.json"


class HiveTrainer(Trainer):
    """Trains one stage.

    Args:
        model: What to train, its parameters already frozen or not by ``apply_rules``.
        args: transformers' arguments; ``max_steps`` and the batch sizes among them.
        parts: What ``apply_rules`` gave: learning rates.
        train_data: Captions or conversations to learn from.
        held_out: Those to judge by.
        collator: Makes the batches.
        pixels: What the collator prepares images with; their second part is done on the device.
        bad_samples: Where unusable samples are named.
        guard: Judges each step before it is applied.
        watchdog: Is told of every batch.
        facts: For the manifests of checkpoints.
        min_learning_rate: Share of its peak at which every group ends.
        **kwargs: For transformers' Trainer.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None
    control: TrainerControl
    is_fsdp_enabled: bool

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        parts: list[TrainedPart],
        train_data: CaptionDataset | InstructionDataset,
        held_out: CaptionDataset | InstructionDataset,
        collator: CaptionCollator | InstructionCollator,
        pixels: SplitProcessor,
        bad_samples: BadSampleLog,
        guard: DivergenceGuard,
        watchdog: Watchdog,
        facts: dict[str, Any],
        min_learning_rate: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_data,
            eval_dataset=held_out,
            **kwargs,
        )
        self.parts = [part for part in parts if part.learning_rate is not None]
        self.pixels = pixels
        self.bad_samples = bad_samples
        self.guard = guard
        self.watchdog = watchdog
        self.facts = facts
        self.min_learning_rate = min_learning_rate
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which uses one: start one process "
                f"for each with torchrun --nproc-per-node {args.n_gpu} -m hive_vision ..., or set "
                "CUDA_VISIBLE_DEVICES to one"
            )
        self._stage = Path(args.output_dir)
        self._staging: Path | None = None
        self._step_sample_ids: list[int] = []
        self._step_loss: Tensor = torch.zeros((), device=args.device)
        self._step_logs: dict[str, float] = {}
        self._tokens = torch.zeros(2, dtype=torch.int64, device=args.device)  # real, all

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; shards on CPUs too, where accelerate would silently not."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            # Both, as accelerate does: each new AcceleratorState copies PartialState's.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        batch_size = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return LengthBucketedSampler(
            self.train_dataset.lengths,
            batch_size=batch_size,
            num_batches=self.args.max_steps,
            seed=self.args.data_seed,
            parts=self.train_dataset.parts,
        )

    def get_train_dataloader(self) -> Any:
        """As in transformers; its workers live on when a launcher sends SIGTERM to everyone."""
        loader = super().get_train_dataloader()
        grace = self.guard.settings.grace_seconds
        own = loader.base_dataloader  # accelerate's has a loader of torch inside
        own.worker_init_fn = partial(_begin_worker, own.worker_init_fn, grace)
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with one learning rate for each rule; no weight decay on biases and norms."""
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        parameters = dict(self.model.named_parameters())
        groups = []
        for part in self.parts:
            for decay in (True, False):
                names = [name for name in part.names if (name in decayed) == decay]
                groups.append(
                    {
                        "name": part.rule,
                        "params": [parameters[name] for name in names],
                        "lr": part.learning_rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                )
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer_class([g for g in groups if g["params"]], **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Linear warmup, then a cosine to ``min_learning_rate`` of each group's own peak."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(
                optimizer,
                lambda step: learning_rate_factor(
                    step, warmup, num_training_steps, self.min_learning_rate
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the loader is what a run most often waits for."""
        self.watchdog.progress("waiting for data")
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do one micro-batch, or pass over it after a rollback."""
        step = self.state.global_step + 1
        self._step_sample_ids += inputs.pop("sample_ids")
        self.watchdog.progress(
            f"in step {step} of {self._stage.name}, samples {self._step_sample_ids[-8:]}"
        )
        self.bad_samples.note(inputs.pop("bad_samples"))
        mask = inputs["attention_mask"]
        self._tokens[0] += mask.sum()
        self._tokens[1] += mask.numel()
        if self.guard.leaves_out(step):
            return torch.zeros((), device=self.args.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss += loss
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, with images as floats and without the logits that nobody reads."""
        inputs = {**self.pixels.normalize(inputs), "return_logits": False}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Look at the gradients before they are clipped: the step's rates and norms."""
        if (self.state.global_step + 1) % self.args.logging_steps == 0:
            assert self.optimizer is not None
            rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
            self._step_logs = {f"learning_rate/{name}": rate for name, rate in rates.items()}
            parameters = dict(self.model.named_parameters())
            for part in self.parts:
                norm = _grad_norm(parameters[name] for name in part.names)
                self._step_logs[f"grad_norm/{part.rule}"] = norm
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Judge the step before the optimiser applies it; called once for each step.

        (With float16 gradients that are not finite are normal: the loss scaler leaves them out.)
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        step, loss = self.state.global_step + 1, 0.0
        if not self.args.fp16 and not self.guard.leaves_out(step):
            if self.guard.watches_loss:
                # Each process's loss is its share times the number of processes.
                loss = sum_over_processes(float(self._step_loss)) / self.args.world_size
            if not self.guard.judge(step, loss, float(norm), self._step_sample_ids):
                # AdamW passes over parameters without a gradient, its state included.
                model.zero_grad(set_to_none=True)
        self._step_sample_ids = []
        self._step_loss.zero_()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates, gradient norms and the share of padding to the trainer's own line.

        Raises:
            TrainingError: If too many samples are unusable.
        """
        if "loss" in logs:
            del logs["learning_rate"]  # of the first group only
            real, places = (sum_over_processes(float(count)) for count in self._tokens)
            logs |= {**self._step_logs, "padding": 1 - real / places}
            self._tokens.zero_()
            self.bad_samples.record()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "held_out",
    ) -> dict[str, float]:
        """Log the held-out caption loss."""
        metrics = {"held_out_loss": self.held_out_loss()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out_loss(self, images: Images = "matched") -> float:
        """Compute the mean loss per supervised held-out token, see ``held_out.py``."""
        self.watchdog.progress("computing the held-out loss")
        return held_out_loss(
            self.model,
            self.eval_dataset,
            self.data_collator,
            self.pixels,
            self.accelerator,
            self.args.per_device_eval_batch_size,
            images,
        )

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging or self._stage)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal it, rename it into place.

        Raises:
            TrainingError: If it cannot be written; the last good one stays.
        """
        step = self.state.global_step
        self.watchdog.progress(f"writing the checkpoint of step {step}")
        self.bad_samples.record()
        try:
            with new_checkpoint(self._stage, step, self.facts) as self._staging:
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    folder = self._staging / f"checkpoint-{step}"
                    write_json(folder / GUARD_STATE, self.guard.state())
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if self.watchdog.lost_process(patience=5) is not None:
                raise  # not this disk's fault
            kept = last_checkpoint(self._stage) or "none yet"
            cause: BaseException = error
            if isinstance(error, CheckpointException):  # it lists every process's
                cause, _ = next(iter(error.failures.values()))
            reason = str(cause).strip().splitlines()[0]
            raise TrainingError(
                f"the checkpoint of step {step} could not be written ({reason}); last good one: "
                f"{kept}. Make room if the disk is full, and run the same command again"
            ) from error
        finally:
            self._staging = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint strictly, and the guard's memory with it."""
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            loaded = load_strictly(type(self.model), folder)
            self.model.load_state_dict(loaded.state_dict())
        state = read_json(folder / GUARD_STATE)
        assert state is not None
        self.guard.load_state(state)


def _begin_worker(first: Callable[[int], None] | None, grace: float, worker: int) -> None:
    """Have a loader's worker serve the step that is finished after a SIGTERM."""
    if first is not None:
        first(worker)

    def end_later(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(grace, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end_later)


def learning_rate_factor(step: int, warmup: int, total: int, minimum: float) -> float:
    """Share of the peak learning rate at a step counted from 0; never 0 while warming up.

    Args:
        step: Optimiser step.
        warmup: Steps until the peak.
        total: Steps of the stage; the last one has the minimum.
        minimum: Share of the peak at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1, total - warmup))
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2


def _grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
