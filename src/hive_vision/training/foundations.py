"""Make the miniature's foundation models: what a download gives where there is a network.

A SigLIP dual encoder, trained contrastively on captions that name colours and kinds only, and a
Llama, trained on the text of the full captions; for VLMs a Llama that was trained to chat, on
conversations without their pictures. All are saved as any checkpoint on the hub is, so the code
that loads real backbones loads these.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipVisionConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hive_vision.conversation import IMAGE_TOKEN, Turn
from hive_vision.folders import written_aside
from hive_vision.models.chat_templates import LLAVA_TEMPLATE

logger = logging.getLogger(__name__)

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"
_PATCH_SIZE = 8
_HEADS, _KEY_VALUE_HEADS = 4, 2
_TEXT_LENGTH = 24  # positions of the SigLIP text tower, and tokens every text is padded to
_LANGUAGE_LENGTH = 512
_RESIDUAL_SCALE = 0.35
_PREPROCESS_BATCH = 512


@dataclass(frozen=True)
class Foundations:
    """Sizes and lengths of the foundation models' training.

    Args:
        seed: start weights and data order are functions of it.
        vision_layers: blocks of the vision tower.
        vision_hidden_size: width of both SigLIP towers, a multiple of 8.
        vision_steps: contrastive steps; 0 leaves the encoder as initialised.
        vision_learning_rate: peak learning rate of the contrastive training.
        language_layers: layers of the language model.
        language_hidden_size: width of the language model, a multiple of 8.
        language_steps: next-token steps; 0 leaves the language model as initialised.
        language_learning_rate: peak learning rate of the language model's training.
        batch_size: images, and captions, in a step.
        vocabulary_size: tokens at most, at least 300 (256 bytes, special tokens, some merges).
    """

    seed: int = 0
    vision_layers: int = 12
    vision_hidden_size: int = 96
    vision_steps: int = 250
    vision_learning_rate: float = 6e-4
    language_layers: int = 8
    language_hidden_size: int = 128
    language_steps: int = 200
    language_learning_rate: float = 2e-3
    batch_size: int = 64
    vocabulary_size: int = 512

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        for name in ("vision_hidden_size", "language_hidden_size"):
            width = getattr(self, name)
            if width < 8 or width % 8:
                raise ValueError(f"{name} is {width}: give a multiple of 8")
        if self.vocabulary_size < 300:
            raise ValueError(f"vocabulary_size is {self.vocabulary_size}: give at least 300")


def train_foundations(data: Path, folder: Path, settings: Foundations) -> None:
    """Train the foundation models on the miniature's data and save them.

    Always on the CPU, so that they are the same whether or not the machine has an accelerator.

    Args:
        data: a folder written by `build_miniature_data`.
        folder: the folder to make; `siglip` and `llama` appear in it.
        settings: sizes and lengths.

    Raises:
        ValueError: if `folder` exists, or `data` holds no captions.
    """
    captions = data / "captions" / "train"
    metadata = captions / "metadata.jsonl"
    if not metadata.is_file():
        raise ValueError(f"{metadata} is missing: build the miniature's data in {data} first")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    with written_aside(folder) as aside:
        texts = [row[column] for row in rows for column in ("caption", "coarse_caption")]
        tokenizer = _train_tokenizer(texts, settings.vocabulary_size)
        _make_siglip(captions, rows, tokenizer, settings, aside)
        captions_ended = [row["caption"] + _EOS for row in rows]
        _train_llama(captions_ended, tokenizer, settings, aside / "llama")
    logger.info("saved the foundation models to %s", folder)


def train_instruct_llama(
    conversations: Sequence[Sequence[Turn]],
    folder: Path,
    settings: Foundations,
    phrases: Sequence[str] = (),
) -> None:
    """Train a Llama on conversations' text, with LLaVA's chat template and words as tokens.

    Half as deep as the captions' Llama, with a quarter of its steps: what it has to learn it learns
    with pictures, and neither more layers nor more text helped there (docs/log.md).

    Args:
        conversations: What to learn, without image tokens.
        folder: The folder to make.
        settings: Sizes and lengths.
        phrases: Texts that are a token each, for what stands in the same words again and again.

    Raises:
        ValueError: If ``folder`` exists.
    """
    template = Template(LLAVA_TEMPLATE)
    texts = [template.render(messages=turns, eos_token=_EOS) for turns in conversations]
    with written_aside(folder) as aside:
        said = [words for text in texts for words in text.split(_EOS)]
        tokenizer = _train_tokenizer(said, 2 * settings.vocabulary_size)
        tokenizer.add_tokens(list(phrases))
        smaller = replace(
            settings,
            language_layers=max(1, settings.language_layers // 2),
            language_steps=settings.language_steps // 4,
        )
        _train_llama(texts, tokenizer, smaller, aside, chat_template=LLAVA_TEMPLATE)
    logger.info("saved the language model for VLMs to %s", folder)


def _train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: it encodes any text, not only the captions'."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[_PAD, _BOS, _EOS, IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, template: str, length: int) -> PreTrainedTokenizerFast:
    """Make a transformers tokenizer that adds the special tokens of `template` around a text."""
    own = Tokenizer.from_str(tokenizer.to_str())
    special = [(token, own.token_to_id(token)) for token in (_BOS, _EOS)]
    own.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        additional_special_tokens=[IMAGE_TOKEN],
        model_max_length=length,
        padding_side="right",
    )


class _ImageTexts(Dataset[dict[str, torch.Tensor]]):
    """Preprocessed images and tokenized texts, in memory.

    Attributes:
        pixel_values: float32, shape (images, 3, size, size).
        input_ids: int64, shape (images, tokens).
    """

    def __init__(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> None:
        self.pixel_values = pixel_values
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "input_ids": self.input_ids[index]}


def _collate_pairs(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    batch: dict[str, Any] = {
        name: torch.stack([sample[name] for sample in samples])
        for name in ("pixel_values", "input_ids")
    }
    batch["return_loss"] = True
    return batch


def _make_siglip(
    images: Path,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    settings: Foundations,
    folder: Path,
) -> None:
    """Train the dual encoder on (image, coarse caption) and save it whole."""
    with Image.open(images / rows[0]["file_name"]) as first:
        size = first.height
    # SigLIP's texts end in EOS and are padded to the full length: its text tower reads the
    # features of the last position, whatever stands there.
    processor = SiglipProcessor(
        SiglipImageProcessor(size={"height": size, "width": size}),
        _wrap(tokenizer, f"$A {_EOS}", _TEXT_LENGTH),
    )
    text_tokenizer = processor.tokenizer
    width = settings.vision_hidden_size
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": _HEADS,
    }
    set_seed(settings.seed)
    text_config = SiglipTextConfig(
        **tower,
        num_hidden_layers=1,
        vocab_size=len(text_tokenizer),
        max_position_embeddings=_TEXT_LENGTH,
        projection_size=width,
        pad_token_id=text_tokenizer.pad_token_id,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
    )
    vision_config = SiglipVisionConfig(
        **tower, num_hidden_layers=settings.vision_layers, image_size=size, patch_size=_PATCH_SIZE
    )
    model = SiglipModel(SiglipConfig(text_config=text_config, vision_config=vision_config))
    with torch.no_grad():
        # A temperature as in the SigLIP paper, and the bias at which a pair is as likely to match
        # as it is in a batch of this size. Transformers starts both at zero.
        model.logit_scale.fill_(math.log(20.0))
        model.logit_bias.fill_(-math.log(max(settings.batch_size - 1, 1)))
        for block in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
            # Residual branches start small. At transformers' scale a deep narrow tower hardly
            # leaves its start in a few hundred steps, here as in every training after this one.
            block.self_attn.out_proj.weight.mul_(_RESIDUAL_SCALE)
            block.mlp.fc2.weight.mul_(_RESIDUAL_SCALE)
    if settings.vision_steps:
        pixel_values = _preprocess(images, [row["file_name"] for row in rows], processor)
        encoded = text_tokenizer(
            [row["coarse_caption"] for row in rows],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        _train(
            model,
            _ImageTexts(pixel_values, encoded["input_ids"]),
            _collate_pairs,
            steps=settings.vision_steps,
            learning_rate=settings.vision_learning_rate,
            settings=settings,
            folder=folder,
        )
    model.save_pretrained(folder / "siglip")
    processor.save_pretrained(folder / "siglip")
    # The processor's file holds the image processor too; older code looks for it on its own.
    processor.image_processor.save_pretrained(folder / "siglip")


def _preprocess(folder: Path, names: Sequence[str], processor: SiglipProcessor) -> torch.Tensor:
    """Run all images through the image processor once; return (images, 3, size, size)."""
    batches = []
    for start in range(0, len(names), _PREPROCESS_BATCH):
        images = []
        for name in names[start : start + _PREPROCESS_BATCH]:
            with Image.open(folder / name) as image:
                images.append(image.convert("RGB"))
        batches.append(processor.image_processor(images, return_tensors="pt")["pixel_values"])
    return torch.cat(batches)


def _train_llama(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    settings: Foundations,
    folder: Path,
    chat_template: str | None = None,
) -> None:
    """Train a language model on texts and save it."""
    # Llama's convention: BOS is added to every text, EOS by whoever ends one.
    text_tokenizer = _wrap(tokenizer, f"{_BOS} $A", _LANGUAGE_LENGTH)
    text_tokenizer.chat_template = chat_template
    set_seed(settings.seed + 1)
    config = LlamaConfig(
        vocab_size=len(text_tokenizer),
        hidden_size=settings.language_hidden_size,
        intermediate_size=2 * settings.language_hidden_size,
        num_hidden_layers=settings.language_layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KEY_VALUE_HEADS,
        max_position_embeddings=_LANGUAGE_LENGTH,
        tie_word_embeddings=True,
        # Transformers' 0.02 suits wide models; narrow ones start closer to what they end at.
        initializer_range=settings.language_hidden_size**-0.5,
        pad_token_id=text_tokenizer.pad_token_id,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    if settings.language_steps:
        encoded = text_tokenizer(list(texts), truncation=True)
        _train(
            model,
            [{"input_ids": ids} for ids in encoded["input_ids"]],
            DataCollatorForLanguageModeling(text_tokenizer, mlm=False),
            steps=settings.language_steps,
            learning_rate=settings.language_learning_rate,
            settings=settings,
            folder=folder,
            train_sampling_strategy="group_by_length",
        )
    model.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)


class _LogLoss(TrainerCallback):
    """Report progress through logging."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            done, steps = state.global_step, state.max_steps
            logger.info("step %d of %d: loss %.3f", done, steps, float(logs["loss"]))


def _train(
    model: PreTrainedModel,
    samples: Dataset[dict[str, torch.Tensor]] | Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    settings: Foundations,
    folder: Path,
    train_sampling_strategy: str = "random",
) -> None:
    """Train all of a model with AdamW, a short warmup and a cosine schedule."""
    logger.info("training %s for %d steps", type(model).__name__, steps)
    scratch = folder / "trainer"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        adam_beta2=0.98,
        seed=settings.seed,
        train_sampling_strategy=train_sampling_strategy,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collate,
        callbacks=[_LogLoss()],
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.train()
    shutil.rmtree(scratch, ignore_errors=True)
