"""Trying a trained model: captions of a pre-trained one, answers of a fine-tuned one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from hive_vision.analysis.inspection import STAGES, first_model
from hive_vision.data.images import StoredImage, read_image
from hive_vision.models.configuration import HiveConfig
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor


def write_captions(model: str, images: Sequence[str], max_new_tokens: int) -> list[str]:
    """Caption images with a pre-trained model.

    Args:
        model: Run folder, whose last finished stage is taken, or a stage's ``model`` folder.
        images: Files.
        max_new_tokens: At most so many tokens each.

    Returns:
        A caption for each image.

    Raises:
        ValueError: If there is no such model or image.
    """
    folders = [Path(model) / stage / "model" for stage in STAGES]
    folder = first_model([*folders, Path(model)], model, "a run of hive-vision pretrain")
    _check_kind(
        folder, HiveConfig.model_type, "captions are written by models of method hive or cascaded"
    )
    device = _device()
    captioner = HiveForConditionalGeneration.from_pretrained(folder).eval().to(device)
    processor = HiveProcessor.from_pretrained(folder)
    captions = []
    for image in images:
        inputs = processor(images=_read(image)).to(device)
        written = captioner.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        captions += processor.batch_decode(written, skip_special_tokens=True)
    return [caption.strip() for caption in captions]


def write_answer(model: str, image: str, question: str, max_new_tokens: int) -> str:
    """Answer a question about an image with a fine-tuned model.

    Args:
        model: Run folder of ``hive-vision finetune``, or any LLaVA folder or hub id.
        image: File.
        question: What is asked.
        max_new_tokens: At most so many tokens.

    Raises:
        ValueError: If there is no such model or image.
    """
    source: Any = model
    if Path(model).exists():
        places = [Path(model) / "model", Path(model)]
        source = first_model(places, model, "a run of hive-vision finetune")
        _check_kind(source, "llava", "questions are answered by models of hive-vision finetune")
    device = _device()
    loaded = AutoModelForImageTextToText.from_pretrained(source).eval().to(device)
    processor = AutoProcessor.from_pretrained(source)
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True
    )
    inputs = processor(
        images=_read(image),
        text=text,
        return_tensors="pt",
    ).to(device)
    written = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer: str = processor.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return answer.strip()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_kind(folder: Path, wanted: str, who: str) -> None:
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind != wanted:
        raise ValueError(f"{str(folder)!r} is a {kind} model; {who}")


def _read(path: str) -> Image.Image:
    return read_image(StoredImage(path=path, bytes=None), path)
