"""Writing the trained encoder as a plain Hugging Face model folder.

The folder needs no part of this package, and older transformers (4.57) read it as well: from
version 5 on, transformers keeps CLIP and SigLIP encoders without the ``vision_model.`` prefix
of all earlier checkpoints, which version 4 would silently replace by random weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from hive_vision.folders import seal, written_aside
from hive_vision.models.backbones import blank_images, load_config

WEIGHTS = "model.safetensors"
OLD_PREFIX = "vision_model."


def export_encoder(
    vision_model: PreTrainedModel,
    image_processor: Any,
    folder: Path,
    card: str,
    facts: Mapping[str, Any],
) -> None:
    """Write encoder, image processor and model card, and prove that they load.

    Args:
        vision_model: The encoder, e.g. ``model.vision_model``.
        image_processor: Its image processor.
        folder: Where to write; replaced as a whole if it exists.
        card: Text of the model card (README.md).
        facts: For the manifest: where the weights come from.

    Raises:
        RuntimeError: If the encoder read back does not give identical features.
    """
    with written_aside(folder, replace=True) as aside:
        vision_model.save_pretrained(aside, max_shard_size="1TB")
        image_processor.save_pretrained(aside)
        if had_prefix(vision_model):
            weights = load_file(aside / WEIGHTS)
            prefixed = {OLD_PREFIX + key.removeprefix(OLD_PREFIX): w for key, w in weights.items()}
            save_file(prefixed, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / "README.md").write_text(card, encoding="utf-8")
        _verify(vision_model, aside)
        seal(aside, "encoder", **facts)


def had_prefix(vision_model: PreTrainedModel) -> bool:
    """Whether transformers knows checkpoints of this model with the old prefix."""
    return any(
        pattern.startswith(r"^vision_model\.")
        for conversion in get_model_conversion_mapping(vision_model)
        for pattern in conversion.source_patterns
    )


def _verify(vision_model: PreTrainedModel, folder: Path) -> None:
    loaded, report = AutoModel.from_pretrained(
        folder,
        dtype=vision_model.dtype,
        attn_implementation=vision_model.config._attn_implementation,  # others round differently
        output_loading_info=True,
    )
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise RuntimeError(f"exported encoder has {len(wrong)} wrong keys, first {wrong[0]!r}")
    loaded.to(vision_model.device)
    expected, features = noise_features(vision_model), noise_features(loaded)
    if not torch.equal(expected, features):
        raise RuntimeError(
            "exported encoder gives other features than the trained one, largest difference "
            f"{(expected - features).abs().max().item():.3g}"
        )


@torch.no_grad()
def noise_features(vision_model: PreTrainedModel) -> Tensor:
    """Give an encoder's features of one image of noise, always the same, in evaluation mode.

    Returns:
        ``last_hidden_state`` (1, N, D), N tokens of width D.
    """
    was_training = vision_model.training
    images = blank_images(load_config(vision_model.config, "vision"))
    blank = images["pixel_values"]
    noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0))
    images["pixel_values"] = noise.to(vision_model.device, vision_model.dtype)
    features: Tensor = vision_model.eval()(**images).last_hidden_state
    vision_model.train(was_training)
    return features


def encoder_card(base: str, method: str | None, summary: str) -> str:
    """Write the encoder's model card.

    Args:
        base: Hub id or folder name of the encoder that training started from.
        method: ``hive``, ``cascaded``, ``sa`` or ``base``; null if it is not known.
        summary: Markdown about the run: stages, data, losses.
    """
    title = "Vision encoder" + (f", method `{method}`" if method else "")
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- vision
- hive-vision
---

# {title}

Started from `{base}`. A plain transformers encoder; no other package is needed:

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("encoder")
processor = AutoImageProcessor.from_pretrained("encoder")
features = model(**processor(images=image, return_tensors="pt")).last_hidden_state
```

{summary}
"""
