"""The training loop: transformers' Trainer with per-group rates, our data order and our loss."""

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hive_vision.data.captions import BadSample, Caption, CaptionDataset
from hive_vision.data.collators import IGNORE_INDEX, CaptionCollator
from hive_vision.data.sampler import LengthBucketedSampler
from hive_vision.training.stages import TrainedPart

Images = Literal["matched", "shuffled", "none"]


logger = logging.getLogger(__name__)


class TrainingError(ValueError):
    """A run that cannot go on; the message says what to do."""


class BadSampleLog:
    """Names unusable samples in a file, once each, and stops the run when there are too many.

    Args:
        path: ``bad_samples.jsonl``; what an interrupted run wrote is kept.
        allowed: More different samples than this stop the run.
    """

    def __init__(self, path: Path, allowed: int) -> None:
        self.path = path
        self.allowed = allowed
        self._seen: set[int] = set()
        if path.exists():
            *lines, _ = path.read_text(encoding="utf-8").split("\n")  # a torn last line is left out
            self._seen = {json.loads(line)["sample_id"] for line in lines}

    def __len__(self) -> int:
        return len(self._seen)

    def record(self, bad_samples: list[BadSample]) -> None:
        """Write down samples that were not known before.

        Raises:
            TrainingError: If there are more than allowed.
        """
        new = [bad for bad in bad_samples if bad.sample_id not in self._seen]
        for bad in new:
            self._seen.add(bad.sample_id)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")
        if new and len(self._seen) > self.allowed:
            raise TrainingError(
                f"{len(self._seen)} samples cannot be used, {self.allowed} are allowed "
                f"(data.max_bad_fraction); they are named in {self.path}"
            )


class ShuffledImages(Dataset[Caption]):
    """Every caption with the image of another sample.

    Args:
        data: The right pairs.
    """

    def __init__(self, data: CaptionDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Caption:
        """Give caption ``index`` with the image half the data set away."""
        other = self.data[(index + len(self) // 2) % len(self)]
        return {**self.data[index], "image": other["image"]}


class HiveTrainer(Trainer):
    """Trains one stage.

    Args:
        model: What to train, its parameters already frozen or not by ``apply_rules``.
        args: transformers' arguments; ``max_steps`` and the batch sizes among them.
        parts: What ``apply_rules`` gave: learning rates.
        train_data: Training captions.
        held_out: Held-out captions.
        collator: Makes the batches.
        bad_samples: Where unusable samples are named.
        min_learning_rate: Share of its peak at which every group ends.
        **kwargs: For transformers' Trainer.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None
    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        parts: list[TrainedPart],
        train_data: CaptionDataset,
        held_out: CaptionDataset,
        collator: CaptionCollator,
        bad_samples: BadSampleLog,
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
        self.bad_samples = bad_samples
        self.min_learning_rate = min_learning_rate
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which uses one: "
                "set CUDA_VISIBLE_DEVICES to it"
            )
        self._step_sample_ids: list[int] = []
        self._step_logs: dict[str, float] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthBucketedSampler(
            self.train_dataset.lengths,
            batch_size=self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            num_batches=self.args.max_steps,
            seed=self.args.data_seed,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with one learning rate for each rule; no weight decay on biases and norms."""
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = []
        for part in self.parts:
            for decay in (True, False):
                names = [name for name in part.parameters if (name in decayed) == decay]
                groups.append(
                    {
                        "name": part.rule,
                        "params": [part.parameters[name] for name in names],
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

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do one micro-batch.

        Raises:
            TrainingError: If too many samples are unusable.
        """
        self._step_sample_ids += inputs.pop("sample_ids")
        self.bad_samples.record(inputs.pop("bad_samples"))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, without the logits that nobody reads."""
        return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Look at the gradients before they are clipped: the step's rates and norms."""
        if (self.state.global_step + 1) % self.args.logging_steps == 0:
            assert self.optimizer is not None
            rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
            self._step_logs = {f"learning_rate/{name}": rate for name, rate in rates.items()}
            for part in self.parts:
                self._step_logs[f"grad_norm/{part.rule}"] = _grad_norm(part.parameters.values())
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Stop before the optimiser can spread a gradient that is not finite.

        Called once for each optimiser step, after clipping. (With float16 such steps are normal:
        the loss scaler leaves them out.)
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16 and not math.isfinite(norm):
            self._stop_on_divergence(float(norm))
        self._step_sample_ids = []
        return norm

    def _stop_on_divergence(self, norm: float) -> None:
        step = self.state.global_step + 1
        path = Path(self.args.output_dir) / "diverged.json"
        content = {"step": step, "grad_norm": str(norm), "sample_ids": self._step_sample_ids}
        path.write_text(json.dumps(content))
        kept = last_checkpoint(Path(self.args.output_dir)) or "none yet (see save_every)"
        raise TrainingError(
            f"loss or gradient is {norm} at step {step}; its samples are named in {path}, last "
            f"good checkpoint: {kept}. Lower the learning rates or look at these samples"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each group's learning rate and gradient norm to the trainer's own line."""
        if "loss" in logs:
            del logs["learning_rate"]  # of the first group only
            logs |= self._step_logs
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

    @torch.no_grad()
    def held_out_loss(self, images: Images = "matched") -> float:
        """Compute the mean loss per supervised held-out token.

        Args:
            images: ``matched``; ``shuffled`` gives each caption the image of the sample half
                the data set away; ``none`` leaves images out (the language model alone).

        Returns:
            Cross-entropy in nats per token.
        """
        model = self.model
        was_training = model.training
        model.eval()
        unusable = 0
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        data = ShuffledImages(self.eval_dataset) if images == "shuffled" else self.eval_dataset
        for batch in self.get_eval_dataloader(data):
            unusable += len(batch.pop("bad_samples"))
            del batch["sample_ids"]
            if images == "none":
                del batch["pixel_values"]
            with self.accelerator.autocast():
                loss = model(**batch, num_items_in_batch=1, return_logits=False).loss
            totals[0] += loss
            totals[1] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        model.train(was_training)
        if unusable:
            logger.warning("%d held-out samples cannot be used and were replaced", unusable)
        summed, tokens = self.accelerator.reduce(totals).tolist()
        return float(summed / tokens)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint strictly.

        transformers saves some families under older key names, which its own trainer then loads
        with ``strict=False``: those weights would silently stay as they are.
        """
        loaded, report = type(self.model).from_pretrained(
            resume_from_checkpoint, dtype=self.model.dtype, output_loading_info=True
        )
        wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if wrong:
            raise TrainingError(f"{resume_from_checkpoint} has wrong keys, first {wrong[0]!r}")
        self.model.load_state_dict(loaded.state_dict())


def last_checkpoint(folder: Path) -> Path | None:
    """Find a stage's newest whole checkpoint; the trainer writes its state file last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        if (checkpoint / TRAINER_STATE_NAME).is_file():
            return checkpoint
        logger.warning("%s is not whole and is left out", checkpoint)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


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


def _grad_norm(parameters: Any) -> float:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0


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
