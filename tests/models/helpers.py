"""Small inputs and random weights for the model tests."""

import torch
from torch import Tensor, nn

from hive_vision.models.hive import HiveForConditionalGeneration
from tests.conftest import IMAGE_SIZE, LANGUAGE_FAMILIES, VISION_FAMILIES, VOCABULARY

# A pairing of every decoder with an encoder (every encoder occurs), for tests where all
# combinations would only repeat themselves.
PAIRS = [
    ("clip", "llama"),
    ("siglip", "qwen3"),
    ("dinov2", "gemma3"),
    ("siglip", "neox"),
    ("vit", "opt"),
    ("dinov3", "qwen2"),
    ("aimv2", "smollm3"),
    ("timm", "olmo2"),
    ("siglip", "phi3"),
    ("timm", "gpt2"),
]
# Every encoder with one decoder, every decoder with one encoder, and the pairs.
COMBINATIONS = [
    *PAIRS,
    *((vision, "llama") for vision in VISION_FAMILIES if vision != "clip"),
    *(("clip", language) for language in LANGUAGE_FAMILIES if language != "llama"),
]
# What an encoder gives for an image: patches, and CLS and registers before them.
PATCHES = 16
PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "vit": 1, "dinov3": 5, "aimv2": 0, "timm": 1}
# timm's list of hidden states is another one than transformers'.
WITH_HIDDEN_STATES = [family for family in VISION_FAMILIES if family != "timm"]
FUSED = ("neox", "phi3", "gpt2")  # q, k and v in one projection: they must start at random


def start_for(language: str) -> str:
    """The start that DESIGN.md prefers where the family allows it."""
    return "random" if language in FUSED else "host"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(seed))


def captions(count: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without special tokens."""
    return torch.randint(4, VOCABULARY, (count, length), generator=generator(seed))


@torch.no_grad()
def add_noise(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Move every weight, so that no bias is zero, no norm trivial and no block near identity."""
    source = generator(seed)
    for parameter in module.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=source)


@torch.no_grad()
def open_cross_attentions(model: HiveForConditionalGeneration, seed: int = 0) -> None:
    """Give random values to whatever starts at zero or one, so that the image matters.

    The query, key and value projections stay as they started.
    """
    add_noise(model.projectors, 0.2, seed)
    for block in model.cross_attentions:
        for name in ("norm", "q_norm", "k_norm", "o_proj", "gate"):
            add_noise(getattr(block, name), 0.3, seed)
