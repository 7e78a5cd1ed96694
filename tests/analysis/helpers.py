"""Models to look into, made of tiny backbones, and pictures for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from hive_vision.analysis.inspection import InspectedModel, Sample
from hive_vision.models.backbones import Source
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from tests.models.helpers import add_noise, open_cross_attentions

CAPTION = "a small red circle and a blue star"
IMAGE_TOKEN = 3
CASCADED = {"layer_selection": "last", "projector_shared": True}


def picture(seed: int = 0, width: int = 32, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_model(
    method: str, vision: Source, language: Source, feature_layer: int = -1
) -> PreTrainedModel:
    """A model in which the image matters and no weight is trivial."""
    torch.manual_seed(0)
    if method == "sa":
        model: Any = SelfAttentionForConditionalGeneration.from_backbones(
            vision, language, IMAGE_TOKEN, feature_layer
        )
        add_noise(model, 0.05)
    else:
        options: dict[str, Any] = CASCADED if method == "cascaded" else {}
        model = HiveForConditionalGeneration.from_backbones(
            vision, language, cross_attention_start="random", **options
        )
        open_cross_attentions(model)
    return model.eval()


def inspect(
    folders: dict[str, Path], method: str, vision: str, language: str, feature_layer: int = -1
) -> InspectedModel:
    model = make_model(method, folders[vision], folders[language], feature_layer)
    return InspectedModel(model, HiveProcessor.from_backbones(folders[vision], folders[language]))


def prepared(model: InspectedModel, count: int) -> list[Sample]:
    """Images with captions of several lengths."""
    words = CAPTION.split()
    return [model.prepare(picture(n), " ".join(words[n % 3 : 3 + n])) for n in range(count)]
