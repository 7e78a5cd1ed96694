"""Predicted memory against what training steps really allocate."""

import re

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, SiglipVisionConfig

from hive_vision.analysis.cost_model import StageCost, stage_cost
from hive_vision.analysis.measuring import measure_peak
from hive_vision.models.backbones import blank_images
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.loss import IGNORE_INDEX
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.training.stages import apply_rules

VISION = SiglipVisionConfig(
    hidden_size=48,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    image_size=32,
    patch_size=4,
)
LANGUAGE = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
    tie_word_embeddings=True,
)
RULES = {
    stage: {
        "projectors": 1e-3,
        "cross_attentions": 1e-3,
        "language_model": "frozen" if stage == 1 else 1e-3,
        "vision_model": 1e-3 if stage == 3 else "frozen",
    }
    for stage in (1, 2, 3)
}
TOKENS, IMAGE_TOKEN = 12, 499


def build(method: str, stage: int, device: str) -> tuple[PreTrainedModel, int]:
    with torch.device(device):
        model: PreTrainedModel
        if method == "sa":
            model = SelfAttentionForConditionalGeneration.from_backbones(
                VISION, LANGUAGE, image_token_id=IMAGE_TOKEN
            )
            image_tokens = model.config.image_seq_length
        else:
            model = HiveForConditionalGeneration.from_backbones(VISION, LANGUAGE, layer_density=0.5)
            image_tokens = 0
    apply_rules(model, RULES[stage])
    return model, image_tokens


def cost_of(method: str, stage: int, autocast: torch.dtype | None = None) -> StageCost:
    model, image_tokens = build(method, stage, "meta")
    with torch.device("meta"):
        images = blank_images(VISION)
    return stage_cost(model, images, image_tokens=image_tokens, autocast=autocast)


def make_batch(size: int, image_tokens: int) -> dict[str, Tensor]:
    """Captions of which one is a token shorter, as in nearly every batch."""
    tokens = torch.full((size, image_tokens + TOKENS), 5)
    tokens[:, 1 : 1 + image_tokens] = IMAGE_TOKEN
    labels = tokens.clone()
    labels[:, : 1 + image_tokens] = IGNORE_INDEX
    mask = torch.ones_like(tokens)
    mask[0, -1], labels[0, -1] = 0, IGNORE_INDEX
    return {
        "pixel_values": torch.zeros(size, 3, 32, 32),
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": labels,
    }


def measured(
    method: str, stage: int, checkpointing: bool, micro: int, share: int, autocast: bool = False
) -> int:
    """Two steps as the trainer makes them; the second one has the optimiser's states."""
    model, image_tokens = build(method, stage, "cpu")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train() -> None:
        optimizer = torch.optim.AdamW(trained, fused=True)
        for _ in range(2):
            batches = [make_batch(micro, image_tokens) for _ in range(share // micro)]
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch, return_logits=False, num_items_in_batch=100).loss
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return measure_peak(train)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", ["hive", "sa"])
def test_predicted_memory_is_near_the_measured(
    method: str, stage: int, checkpointing: bool
) -> None:
    cost = cost_of(method, stage)
    for micro, share in ((4, 8), (24, 24)):
        memory = cost.memory(micro, TOKENS, share=share, checkpointing=checkpointing)
        real = measured(method, stage, checkpointing, micro, share)
        assert memory.total - memory.weights == pytest.approx(real, rel=0.15), (micro, memory)


def test_with_autocast() -> None:
    """The CPU's autocast keeps what a GPU's keeps, as far as these models go."""
    memory = cost_of("hive", 3, torch.bfloat16).memory(6, TOKENS, share=6)
    real = measured("hive", 3, False, 6, 6, autocast=True)
    assert memory.total - memory.weights == pytest.approx(real, rel=0.15), memory


def test_parts_of_the_memory() -> None:
    cost = cost_of("hive", 2)
    model, _ = build("hive", 2, "meta")
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    memory = cost.memory(4, TOKENS, share=16)
    assert memory.optimizer == 2 * trained
    assert memory.gradients == trained
    assert memory.weights >= sum(4 * p.numel() for p in model.parameters())
    assert memory.waiting == 12 * 3 * 32 * 32 * 4
    assert memory.total == pytest.approx(sum(vars(memory).values()))
    assert cost.memory(4, TOKENS, share=16, on_cpu=True).waiting == 16 * 3 * 32 * 32 * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_grows_with_what_it_should(checkpointing: bool) -> None:
    cost = cost_of("hive", 3)

    def total(micro: int, tokens: int = TOKENS, **options: bool | int) -> float:
        given = {"share": 64, "checkpointing": checkpointing, **options}
        return cost.memory(micro, tokens, **given).total

    assert total(1) < total(8) < total(32) < total(64)
    assert total(8) < total(8, tokens=60)
    assert total(8, share=16) < total(8, share=32)


def test_sharding_divides_and_ddp_adds() -> None:
    cost = cost_of("hive", 3)
    alone = cost.memory(8, TOKENS, share=16)
    ddp = cost.memory(8, TOKENS, share=16, devices=4)
    sharded = cost.memory(8, TOKENS, share=16, devices=4, sharded=True)
    assert ddp.gradients == 2 * alone.gradients
    assert ddp.optimizer == alone.optimizer
    assert sharded.optimizer == alone.optimizer / 4
    assert sharded.gradients == alone.gradients / 4
    assert alone.weights / 4 < sharded.weights < alone.weights


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_gathered_is_what_training_shards_as_blocks(method: str) -> None:
    """Projectors and embeddings belong to no block; told apart by name."""
    model, _ = build(method, 3, "meta")
    blocks: dict[str, int] = {}
    outside = 0
    for name, parameter in model.named_parameters():
        block = re.match(r"(.*\.layers|cross_attentions)\.\d+\.", name)
        if block is None:
            outside += 4 * parameter.numel()
        else:
            blocks[block[0]] = blocks.get(block[0], 0) + 4 * parameter.numel()
    assert cost_of(method, 3).gathered == outside + 2 * max(blocks.values())
