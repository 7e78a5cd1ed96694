"""The attention for CPUs is sdpa, in the backward pass too."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hive_vision.models.cpu_attention import CPU_ATTENTION, sdpa_or_products
from tests.models.conftest import MakeHive


class Layer(nn.Module):
    """What attention functions read of an attention layer."""

    def __init__(self, num_key_value_groups: int, is_causal: bool) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups
        self.is_causal = is_causal


@given(
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    lengths=st.sampled_from([(5, 5), (5, 9), (1, 7)]),
    masked=st.sampled_from(["none", "boolean", "added", "of keys"]),
    is_causal=st.booleans(),
    scaling=st.sampled_from([None, 0.3]),
)
def test_values_and_gradients_are_those_of_sdpa(
    heads: tuple[int, int],
    lengths: tuple[int, int],
    masked: str,
    is_causal: bool,
    scaling: float | None,
) -> None:
    (query_heads, groups), (queries, keys) = heads, lengths
    if is_causal and masked == "none" and queries != keys:
        return  # sdpa aligns its triangle at another corner
    torch.manual_seed(0)
    layer = Layer(query_heads // groups, is_causal)
    shapes = [(2, query_heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8)]
    given_tensors = [torch.randn(shape) for shape in shapes]
    allowed = torch.rand(2, 1, 1 if masked == "of keys" else queries, keys) < 0.7
    allowed[..., 0] = True
    mask = {
        "none": None,
        "boolean": allowed,
        "of keys": allowed,
        "added": torch.where(allowed, 0.0, torch.finfo(torch.bfloat16).min),
    }[masked]

    def run(attend: Callable[..., tuple[Tensor, None]], dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in given_tensors]
        added = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
        output, _ = attend(layer, *inputs, added, scaling=scaling)
        output.float().square().sum().backward()
        assert all(tensor.grad is not None for tensor in inputs)
        return [output, *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    exact = run(sdpa_attention_forward, torch.float64)
    rounded = run(sdpa_attention_forward, torch.bfloat16)
    found = run(sdpa_or_products, torch.bfloat16)
    for ours, theirs, right in zip(found, rounded, exact, strict=True):
        assert ours.shape == right.shape
        error, usual = ((x - right).norm() / (right.norm() + 1e-6) for x in (ours, theirs))
        assert error < max(3 * usual, 0.02), (error, usual)


@pytest.mark.parametrize("reason", ["no gradient", "float32", "dropout"])
def test_sdpa_does_what_it_is_better_at(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = Layer(1, False), []

    def sdpa(*args: object, **kwargs: object) -> tuple[str, None]:
        calls.append(kwargs)
        return "output", None

    monkeypatch.setattr("hive_vision.models.cpu_attention.sdpa_attention_forward", sdpa)
    dtype = torch.float32 if reason == "float32" else torch.bfloat16
    states = torch.zeros(1, 2, 3, 4, dtype=dtype, requires_grad=reason != "no gradient")
    dropout = 0.1 if reason == "dropout" else 0.0
    assert sdpa_or_products(layer, states, states, states, None, dropout=dropout)[0] == "output"
    assert calls[0]["dropout"] == dropout


def test_autocast_says_what_is_computed(
    open_hive: MakeHive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary embeddings make float32 of queries and keys: the language model too has products."""
    monkeypatch.setattr("hive_vision.models.cpu_attention.sdpa_attention_forward", None)
    model = deepcopy(open_hive("siglip", "llama")).train()
    model.set_attn_implementation(CPU_ATTENTION)
    ids = torch.randint(3, 200, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        model(pixel_values=torch.randn(2, 3, 32, 32), input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(TypeError, match="not callable"), torch.no_grad():
        model(pixel_values=torch.randn(2, 3, 32, 32), input_ids=ids)


@pytest.mark.parametrize("padded", [False, True])
def test_a_whole_model_computes_the_same(open_hive: MakeHive, padded: bool) -> None:
    """In bfloat16 within its rounding: loss and every gradient, for right-padded captions."""
    model = deepcopy(open_hive("siglip", "llama")).train()
    torch.manual_seed(0)
    batch = {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "input_ids": torch.randint(3, 200, (2, 7)),
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
    }
    if padded:
        batch["attention_mask"][0, 4:] = 0
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    results = []
    for attention in ("sdpa", CPU_ATTENTION):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    model.set_attn_implementation("sdpa")
    (loss, grads), (other_loss, other_grads) = results
    assert other_loss == pytest.approx(loss, rel=2e-3)
    assert grads.keys() == other_grads.keys()
    whole, other = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, other_grads))
    assert torch.cosine_similarity(whole, other, dim=0) > 0.999
