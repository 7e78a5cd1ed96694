"""Whole dual encoders (CLIP, SigLIP), and what is made of a trained encoder with other weights.

A dual encoder compares images with texts: a vision half, a text half, and projections between
them. Training changes the vision half alone; here it comes back into the whole model, or to a
place between where training started and where it ended.
"""

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    cached_file,
    is_protobuf_available,
    is_sentencepiece_available,
)

from hive_vision.folders import check_keys, seal, written_aside
from hive_vision.models.backbones import load_config
from hive_vision.models.export import noise_features

# Contrastive training has a temperature; a model that joins images and text otherwise has none.
TEMPERATURE = "logit_scale"
TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"),
    "sentencepiece.bpe.model",
)
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, *TOKENIZER_FILES)
# Of a normalised pixel: two decoders of the same preprocessing round to neighbouring grey values.
ROUNDING = 0.05

_HALVES = {"vision_config", "text_config"}


def load_dual_encoder(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a whole dual encoder in float32 and in evaluation mode.

    Args:
        source: Hub id or folder.
        **options: For ``from_pretrained``.

    Raises:
        ValueError: If it is no dual encoder, cannot be loaded, or lacks weights.
    """
    config = load_config(source, "dual-encoder")
    what = f"{str(source)!r} ({config.model_type}) is no dual encoder"
    how = "give a whole model with a text half, e.g. CLIP or SigLIP"
    if not config.sub_configs.keys() >= _HALVES:
        raise ValueError(f"{what}: its config.json has no vision_config and text_config; {how}")
    try:
        with torch.device("meta"):
            parameters = dict(AutoModel.from_config(config).named_parameters(recurse=False))
        if TEMPERATURE in parameters:
            model, report = AutoModel.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below like missing ones
                **options,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"dual encoder {str(source)!r} cannot be loaded: {_first_line(error)}"
        ) from error
    if TEMPERATURE not in parameters:
        raise ValueError(f"{what}: it was not trained to compare images with texts; {how}")
    wrong = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"dual encoder {str(source)!r} lacks {len(wrong)} weights of a {type(model).__name__}, "
            f"which would stay random, first {wrong[0]!r}; its config.json belongs to other weights"
        )
    return model.eval()


def is_dual_encoder(source: str | Path) -> bool:
    """Whether a folder or hub id holds an image half and a text half."""
    return bool(load_config(source, "dual-encoder").sub_configs.keys() >= _HALVES)


def load_processor(source: str | Path) -> Any:
    """Load the processor of a dual encoder: tokenizer and image processor.

    Raises:
        ValueError: If either is missing.
    """
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise ValueError(_no_processor(source, _first_line(error))) from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(_no_processor(source, f"found only a {type(processor).__name__}"))
    return processor


def _no_processor(source: str | Path, reason: str) -> str:
    if not (is_sentencepiece_available() and is_protobuf_available()):
        reason = (
            "if its tokenizer is a sentencepiece model, as SigLIP's is, install what reads it: "
            f"pip install sentencepiece protobuf ({reason})"
        )
    return (
        f"{str(source)!r} has no whole processor (tokenizer and image processor): {reason}; save "
        "that of the model it came from beside it"
    )


def vision_half(dual_encoder: PreTrainedModel) -> PreTrainedModel:
    """Give the encoder inside a dual encoder, found by its configuration.

    Raises:
        ValueError: If there is none that could be taken out.
    """
    wanted = dual_encoder.config.vision_config
    for module in dual_encoder.modules():
        if isinstance(module, PreTrainedModel) and module.config is wanted:
            return module
    raise ValueError(f"a {type(dual_encoder).__name__} has no vision half that is an own model")


def replace_vision_half(
    dual_encoder: PreTrainedModel, encoder: PreTrainedModel, name: str | Path
) -> None:
    """Give a loaded dual encoder the weights of another encoder, in place.

    Args:
        dual_encoder: The whole model.
        encoder: The plain encoder, on the same device and of the same dtype.
        name: What the whole model is called, for messages.

    Raises:
        ValueError: If the encoder does not belong into it.
    """
    half = vision_half(dual_encoder)
    _check_same_weights(half, encoder, f"the vision half of {str(name)!r}", "the encoder")
    half.load_state_dict(encoder.state_dict())
    if not torch.equal(noise_features(half), noise_features(encoder)):
        raise ValueError(
            f"the encoder's weights give other features inside {str(name)!r}; in their config.json "
            f"differ {_differing(half, encoder)}: give the model that training started from"
        )


@torch.no_grad()
def interpolate_encoders(
    base: PreTrainedModel, trained: PreTrainedModel, alpha: float
) -> PreTrainedModel:
    """Make an encoder with weights between those before and after training.

    theta = (1 - alpha) * base + alpha * trained for floating-point parameters and buffers, in
    float32; 0 gives exactly base and 1 exactly trained. Both models stay as they are.

    Args:
        base: The encoder that training started from.
        trained: What came out.
        alpha: From 0 to 1.

    Returns:
        A new model in evaluation mode.

    Raises:
        ValueError: If alpha is outside, or the two are not the same architecture.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 (base) to 1 (trained)")
    _check_same_weights(base, trained, "the base encoder", "the trained one")
    for fact in ("dtype", "device"):
        if getattr(base, fact) != getattr(trained, fact):
            raise ValueError(
                f"the base encoder has {fact} {getattr(base, fact)} and the trained one "
                f"{getattr(trained, fact)}; load both alike"
            )
    mixed = deepcopy(trained).eval()
    mixed.set_attn_implementation(base.config._attn_implementation)  # another one rounds otherwise
    targets, starts, ends = _tensors(mixed), _tensors(base), _tensors(trained)
    for name, target in targets.items():
        target.copy_(starts[name])
    if not torch.equal(noise_features(mixed), noise_features(base)):
        raise ValueError(
            "the base encoder and the trained one compute differently with the same weights, so "
            f"nothing lies between them; in their config.json differ {_differing(base, trained)}"
        )
    mixed.set_attn_implementation(trained.config._attn_implementation)
    for name, target in targets.items():
        if alpha == 0 or alpha == 1:  # not through 0 * x, which loses the sign of a zero
            target.copy_((starts if alpha == 0 else ends)[name])
        elif target.is_floating_point():
            target.copy_((1 - alpha) * starts[name].float() + alpha * ends[name].float())
        else:
            target.copy_(ends[name])
    return mixed


def export_dual_encoder(
    vision_model: PreTrainedModel,
    image_processor: Any,
    full: str | Path,
    folder: Path,
    card: str,
    facts: Mapping[str, Any],
) -> None:
    """Write a dual encoder with another vision half, and prove that it loads.

    All else stays as it was: text half, projections, and the files of tokenizer and image
    processor, which are copied, so that whatever could read them still can. Weights are float32.

    Args:
        vision_model: The trained encoder.
        image_processor: What it was trained with.
        full: Hub id or folder of the dual encoder that it came from.
        folder: Where to write; must not exist.
        card: Text of the model card (README.md).
        facts: For the manifest: where the weights come from.

    Raises:
        ValueError: If the encoder does not belong into ``full``, or ``folder`` exists.
        RuntimeError: If what is read back is not what was written.
    """
    encoder = deepcopy(vision_model).to("cpu", torch.float32).eval()
    attention = {"attn_implementation": encoder.config._attn_implementation}  # others round so
    model = load_dual_encoder(full, **attention)
    processor = load_processor(full)
    replace_vision_half(model, encoder, full)
    _check_same_images(image_processor, processor.image_processor, full)
    with written_aside(folder) as aside:
        model.save_pretrained(aside, max_shard_size="1TB")
        _copy_processor(full, aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
        loaded, report = AutoModel.from_pretrained(
            aside, dtype=torch.float32, output_loading_info=True, **attention
        )
        wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
        weights = loaded.state_dict()
        wrong += [key for key, old in model.state_dict().items() if not old.equal(weights[key])]
        if wrong:
            raise RuntimeError(f"{folder} has {len(wrong)} wrong weights, first {wrong[0]!r}")
        if not torch.equal(noise_features(vision_half(loaded)), noise_features(encoder)):
            raise RuntimeError(f"the vision half of {folder} gives other features than the encoder")
        _check_same_processor(processor, load_processor(aside), folder)
        seal(aside, "dual_encoder", **facts)


def _check_same_weights(
    first: PreTrainedModel, second: PreTrainedModel, first_name: str, second_name: str
) -> None:
    """Refuse models of other classes, or with weights of other names or shapes.

    Raises:
        ValueError: Names what was expected and what was found.
    """
    how = "give the model that training started from"
    if type(first) is not type(second):
        raise ValueError(
            f"{first_name} is a {type(first).__name__} but {second_name} is a "
            f"{type(second).__name__}; {how}"
        )
    wanted, found = _tensors(first), _tensors(second)
    try:
        check_keys(wanted, found, second_name)
    except ValueError as error:
        raise ValueError(f"{error}; expected were those of {first_name}: {how}") from error
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise ValueError(
                f"{first_name} has {name} of shape {tuple(tensor.shape)} but {second_name} has "
                f"{tuple(found[name].shape)}; {how}"
            )


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _differing(first: PreTrainedModel, second: PreTrainedModel) -> str:
    ours, theirs = first.config.to_dict(), second.config.to_dict()
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return ", ".join(f"{key} ({ours.get(key)}, {theirs.get(key)})" for key in keys) or "no values"


def _picture() -> Image.Image:
    """Make an image, neither square nor grey, on which preprocessings show their differences."""
    height, width = np.mgrid[0:120, 0:160]
    channels = [height * 2, width * 1.5, 127 + 100 * np.sin(height / 9) * np.cos(width / 7)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _check_same_images(ours: Any, theirs: Any, full: str | Path) -> None:
    """Refuse an encoder whose images were prepared otherwise.

    Raises:
        ValueError: If so.
    """
    first, second = (
        processor(_picture(), return_tensors="pt")["pixel_values"].float()
        for processor in (ours, theirs)
    )
    if first.shape != second.shape or (first - second).abs().max() > ROUNDING:
        raise ValueError(
            f"the encoder's image processor prepares images otherwise than that of {str(full)!r} "
            "(see preprocessor_config.json of both); give the model that training started from"
        )


def _copy_processor(full: str | Path, folder: Path) -> None:
    """Copy the files of tokenizer and image processor as they are."""
    for name in PROCESSOR_FILES:
        try:
            path = cached_file(str(full), name)
        except OSError:  # not every processor has every file; what is needed is verified
            continue
        shutil.copyfile(path, folder / name)


def _check_same_processor(ours: Any, theirs: Any, folder: Path) -> None:
    text = ["A photo of two Dogs, 3 cats."]
    pictures = [p.image_processor(_picture(), return_tensors="pt") for p in (ours, theirs)]
    same = torch.equal(*(picture["pixel_values"] for picture in pictures))
    if not same or ours(text=text)["input_ids"] != theirs(text=text)["input_ids"]:
        raise RuntimeError(f"the processor in {folder} gives other inputs than the one it is of")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def dual_encoder_card(full: str, encoder: str, summary: str) -> str:
    """Write the model card of a dual encoder whose vision half was trained alone.

    Args:
        full: Hub id or folder name of the dual encoder.
        encoder: Of the trained encoder.
        summary: Markdown: how it was made.
    """
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- vision
- hive-vision
---

# `{full}` with a trained vision half

The vision half is `{encoder}`. Text half, projections, tokenizer and image processor are those of
`{full}`, unchanged.

**Measure zero-shot accuracy before you use it.** The text half was trained to match the old vision
half; it no longer matches the new one exactly. Fine-tuning an encoder alone is known to cost more
than 20 points of zero-shot accuracy. Weights between the old and the new vision half
(`hive-vision export --interpolate`) often keep more of it.

{summary}

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("folder")
processor = AutoProcessor.from_pretrained("folder")
inputs = processor(
    text=["a photo of a cat.", "a photo of a dog."],
    images=image,
    padding="max_length",
    truncation=True,
    return_tensors="pt",
)
scores = model(**inputs).logits_per_image
```
"""
