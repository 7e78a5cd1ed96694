"""Protocol ``paper``: a head on a frozen encoder, trained on augmented images (Table 4).

Shapes: M images, B of them at once, N tokens of one image, D encoder width, C classes.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from torchvision import transforms
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hive_vision.data.classification import ClassificationSet, LabelledImages
from hive_vision.evaluation.arguments import PaperProtocol
from hive_vision.evaluation.features import FrozenEncoder, Reading
from hive_vision.evaluation.probing import Outcome
from hive_vision.folders import written_aside

logger = logging.getLogger(__name__)

FOUND = "correct.npy"


class FrozenEncoderClassifier(nn.Module):
    """A head on an encoder that is no part of it: neither trained, moved nor saved with it.

    Args:
        encoder: The encoder.
        reading: What the head reads of it; (B, N, D) or (B, D).
        head: A probe of ``models/probes.py``.
    """

    def __init__(self, encoder: FrozenEncoder, reading: Reading, head: nn.Module) -> None:
        super().__init__()
        self._encoder = (encoder, reading)
        self.head = head

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """Classify images.

        Args:
            labels: Class numbers (B,).
            num_items_in_batch: Images of the whole step, of which these B are a part; Trainer
                gives it and sums what the parts return.
            **inputs: What the image processor gave for the B images.

        Returns:
            ``logits`` (B, C), and ``loss`` if there are labels.
        """
        encoder, reading = self._encoder
        (tokens,) = encoder.read(inputs, [reading])
        if tokens.dim() == 2:
            tokens = tokens[:, None]
        logits = self.head(tokens)
        if labels is None:
            return {"logits": logits}
        step_images = len(labels) if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy(logits, labels, reduction="sum") / step_images
        return {"loss": loss, "logits": logits}


def augmentation(settings: PaperProtocol, size: tuple[int, int]) -> transforms.Compose:
    """Make the training augmentation of Table 4 for images of ``size`` (height, width)."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size,
                scale=settings.crop_scale,
                ratio=settings.crop_ratio,
                interpolation=transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(settings.flip),
            transforms.ColorJitter(settings.jitter, settings.jitter, settings.jitter, hue=0),
        ]
    )


def probe_paper(
    encoder: FrozenEncoder,
    reading: Reading,
    data: ClassificationSet,
    make_head: Any,
    settings: PaperProtocol,
    seeds: Sequence[int],
    work: Path,
    workers: int,
) -> Outcome:
    """Train a head for each seed to Table 4 and judge it on the test images.

    Args:
        encoder: The encoder.
        reading: What heads read of it.
        data: The images.
        make_head: Makes a head with fresh weights.
        settings: The protocol's numbers.
        seeds: S of them.
        work: Folder for what an interrupted run goes on from, and what each seed found.
        workers: Processes that decode and augment images; with one, this one does.

    Raises:
        ValueError: If the encoder reads images of any size, the warmup is all there is, or an
            image cannot be decoded.
    """
    if settings.epochs <= settings.warmup_epochs:
        raise ValueError(
            f"paper.epochs is {settings.epochs:g} but the warmup alone takes "
            f"{settings.warmup_epochs:g}; give paper.warmup_epochs="
            f"{0.03 * settings.epochs:g}, the same share as 1.5 of 50"
        )
    if torch.cuda.device_count() > 1:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible, and a probe uses one; set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    size = _image_size(encoder)
    prepare = _Collator(encoder.image_processor)
    train = _Samples(data.train, augmentation(settings, size))
    test = _Samples(data.test)
    correct = []
    for seed in seeds:
        folder = work / f"seed-{seed}"
        if not (folder / FOUND).is_file():
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                head = make_head()
            classifier = FrozenEncoderClassifier(encoder, reading, head)
            on_cpu = encoder.device.type == "cpu"
            trainer = Trainer(
                classifier,
                training_arguments(settings, len(train), seed, folder, workers, on_cpu),
                train_dataset=train,
                data_collator=prepare,
                callbacks=[_Progress(f"{encoder.name} on {data.name}, seed {seed}")],
            )
            trainer.remove_callback(PrinterCallback)
            try:
                trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
                predictions = trainer.predict(test).predictions.argmax(axis=1)
            except ValueError as error:
                # A loader's process hands on a whole traceback, whose last line is the error's own.
                line = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
                raise ValueError(line) from error
            with written_aside(folder, replace=True) as aside:  # in place of the checkpoints
                np.save(aside / FOUND, predictions == data.test.labels)
        correct.append(np.load(folder / FOUND))
    return Outcome(np.stack(correct), tuple(seeds))


def training_arguments(
    settings: PaperProtocol, images: int, seed: int, folder: Path, workers: int, on_cpu: bool
) -> TrainingArguments:
    """Translate Table 4 into transformers' arguments.

    Args:
        settings: The protocol's numbers.
        images: M training images.
        seed: Of the data order.
        folder: For checkpoints, one after each epoch.
        workers: Processes that decode and augment images; with one, this one does.
        on_cpu: Whether the encoder is there, whatever else the machine has.
    """
    micro = math.gcd(settings.batch_size, settings.micro_batch_size)
    epoch_steps = math.ceil(images / settings.batch_size)
    return TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_epochs * epoch_steps),
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        dataloader_num_workers=0 if workers == 1 else workers,
        remove_unused_columns=False,
    )


def _last_checkpoint(folder: Path) -> str | None:
    """Find the newest checkpoint that is whole: its last file is there."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _image_size(encoder: FrozenEncoder) -> tuple[int, int]:
    pixels = encoder.image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")
    if pixels["pixel_values"].dim() != 4:
        raise ValueError(
            f"{encoder.name!r} reads images of any shape, which protocol=paper with its square "
            "crops cannot; use protocol=fast"
        )
    height, width = pixels["pixel_values"].shape[-2:]
    return height, width


class _Samples(Dataset[dict[str, Any]]):
    """Images with their labels, augmented when they are read."""

    def __init__(self, images: LabelledImages, augment: Any = None) -> None:
        self.images = images
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self.images[row]
        image = image if self.augment is None else self.augment(image)
        return {"image": image, "label": int(self.images.labels[row])}


class _Collator:
    """Preprocesses B images."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [sample["image"] for sample in samples]
        inputs = self.image_processor(images, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([sample["label"] for sample in samples])}


class _Progress(TrainerCallback):
    """A line after each epoch."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say where training stands."""
        if logs is not None and "loss" in logs:
            logger.info(
                "%s: epoch %.0f of %g, loss %.4f",
                *(self.title, state.epoch, args.num_train_epochs, float(logs["loss"])),
            )
