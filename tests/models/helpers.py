"""Small inputs and random weights for the model tests."""

import torch
from torch import Tensor, nn

from hive_vision.models.hive import HiveForConditionalGeneration
from tests.conftest import IMAGE_SIZE, VOCABULARY

# A pairing of every decoder with an encoder (every encoder occurs), for tests where all
# twenty would only repeat themselves. GPT-NeoX fuses q, k and v: it must start at random.
PAIRS = [
    ("clip", "llama"),
    ("siglip", "qwen3"),
    ("dinov2", "gemma3"),
    ("siglip", "neox"),
    ("vit", "opt"),
]


def start_for(language: str) -> str:
    """The start that DESIGN.md prefers where the family allows it."""
    return "random" if language == "neox" else "host"


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
