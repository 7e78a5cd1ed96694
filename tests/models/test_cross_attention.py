"""The cross-attention block against its equation, and the properties that follow from it."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hive_vision.models.backbones import find_blocks
from hive_vision.models.configuration import HiveConfig
from hive_vision.models.cross_attention import (
    AttendBeforeLayer,
    CrossAttention,
    attention_geometry,
    host_projections,
)
from tests.conftest import LANGUAGE_FAMILIES, text_config, vision_config
from tests.models.helpers import FUSED, add_noise, generator

E, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 48, 4, 2, 12  # as in conftest.text_config("llama")


def make_block(
    language: str = "llama", attention: str = "sdpa", bias: bool = False, **fusion: Any
) -> CrossAttention:
    """A block with weights as they start."""
    config = HiveConfig(
        vision_config=vision_config("clip"), text_config=text_config(language), **fusion
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return CrossAttention(config, bias=bias)


def random_block(**options: Any) -> CrossAttention:
    block = make_block(**options)
    add_noise(block, 0.2)
    return block


def text(length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(2, length, E, generator=generator(seed))


def image(count: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(2, count, E, generator=generator(seed))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def written_out(block: CrossAttention, hidden: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """H + gate * o(concat_h softmax(Q_h K_h^T / sqrt(d)) V_h), head by head."""
    weights = dict(block.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    query = linear("q_proj", rms_norm(hidden, weights["norm.weight"]))
    key, value = linear("k_proj", features), linear("v_proj", features)
    contexts, attentions = [], []
    for head in range(HEADS):
        shared = head // (HEADS // KEY_VALUE_HEADS)
        q = query[..., head * HEAD_DIM : (head + 1) * HEAD_DIM]
        k = key[..., shared * HEAD_DIM : (shared + 1) * HEAD_DIM]
        v = value[..., shared * HEAD_DIM : (shared + 1) * HEAD_DIM]
        if "q_norm.weight" in weights:
            q, k = rms_norm(q, weights["q_norm.weight"]), rms_norm(k, weights["k_norm.weight"])
        scores = (q @ k.transpose(1, 2) / HEAD_DIM**0.5).exp()
        attentions.append(scores / scores.sum(-1, keepdim=True))
        contexts.append(attentions[-1] @ v)
    update = linear("o_proj", torch.cat(contexts, dim=-1))
    if "gate.weight" in weights:
        update = weights["gate.weight"].tanh() * update
    return hidden + update, torch.stack(attentions, dim=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", ["none", "tanh"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equation(attention: str, bias: bool, gate: str, qk_norm: bool) -> None:
    block = random_block(
        attention=attention, bias=bias, cross_attention_gate=gate, cross_attention_qk_norm=qk_norm
    )
    expected, expected_weights = written_out(block, text(), image())
    hidden, no_weights = block(text(), image())
    same_hidden, weights = block(text(), image(), True)
    assert no_weights is None
    assert weights.shape == (2, HEADS, 5, 7)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(same_hidden, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 5))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_image_tokens_have_no_order(attention: str) -> None:
    block, shuffled = random_block(attention=attention), torch.randperm(7, generator=generator(0))
    torch.testing.assert_close(block(text(), image()[:, shuffled]), block(text(), image()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_text_positions_do_not_see_each_other_and_all_see_the_whole_image(attention: str) -> None:
    block = random_block(attention=attention)
    together, _ = block(text(), image())
    alone = torch.cat([block(text()[:, t : t + 1], image())[0] for t in range(5)], dim=1)
    torch.testing.assert_close(together, alone)
    changed = image()
    changed[:, -1] += 1  # a causal mask would hide the last image token from the first position
    assert (block(text(), changed)[0] - together).abs().amax(-1).min() > 1e-4


def test_equal_image_tokens_are_one_image_token() -> None:
    block = random_block()
    one = image(1)
    torch.testing.assert_close(block(text(), one.expand(-1, 9, -1)), block(text(), one))


@pytest.mark.parametrize("gate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_start_is_an_exact_identity_until_its_last_factor_moves(gate: str, bias: bool) -> None:
    block = make_block(cross_attention_gate=gate, bias=bias)
    assert block.is_identity()
    assert torch.equal(block(text(), image())[0], text())
    last = block.o_proj if gate == "none" else block.gate
    with torch.no_grad():
        last.weight.view(-1)[0] = 0.1
    assert not block.is_identity()
    assert not torch.equal(block(text(), image())[0], text())


@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_at_the_start_only_the_last_factor_learns(gate: str) -> None:
    block = make_block(cross_attention_gate=gate)
    features = image().requires_grad_()
    block(text(), features)[0].square().sum().backward()
    moved = {n for n, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"o_proj.weight" if gate == "none" else "gate.weight"}
    assert not features.grad.any()


def first_host(language: str) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(text_config(language))
    add_noise(model, 0.1)
    return find_blocks(model, 4)[0]


@pytest.mark.parametrize("gate", ["none", "tanh"])
@pytest.mark.parametrize("language", [f for f in LANGUAGE_FAMILIES if f not in FUSED])
def test_host_start_copies_the_hosts_projections(language: str, gate: str) -> None:
    bias = language in ("opt", "qwen2")
    block = make_block(language, bias=bias, cross_attention_gate=gate)
    host = first_host(language)
    block.copy_from_host(host)
    output = "out_proj" if language == "opt" else "o_proj"
    for ours, theirs in [("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj")]:
        source = getattr(host.self_attn, theirs).state_dict()
        assert source.keys() == getattr(block, ours).state_dict().keys()
        for name, value in getattr(block, ours).state_dict().items():
            assert torch.equal(value, source[name]), (ours, name)
            assert value.data_ptr() != source[name].data_ptr(), "a copy, not shared"
    copied = torch.equal(block.o_proj.weight, getattr(host.self_attn, output).weight)
    assert copied == (gate == "tanh")
    assert block.is_identity()


@pytest.mark.parametrize("language", FUSED)
def test_fused_projections_cannot_be_copied(language: str) -> None:
    message = " fuses .* cannot be copied; set cross_attention_start to random"
    with pytest.raises(ValueError, match=message):
        make_block(language).copy_from_host(first_host(language))


@pytest.mark.parametrize("language", LANGUAGE_FAMILIES)
def test_geometry_is_the_hosts(language: str) -> None:
    size, heads, key_value_heads, head_dim = attention_geometry(text_config(language))
    grouped = language not in ("neox", "opt", "gpt2")
    assert (size, heads, head_dim) == (48, 4, 12)
    assert key_value_heads == (2 if grouped else 4)
    projections = host_projections(first_host(language))
    if language in FUSED:
        assert projections is None
        return
    assert projections is not None
    assert projections["q_proj"].weight.shape == (heads * head_dim, size)
    assert projections["k_proj"].weight.shape == (key_value_heads * head_dim, size)
    assert projections["o_proj"].weight.shape == (size, heads * head_dim)


class Recorder(nn.Module):
    """Stands for a language-model layer; keeps what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = args, kwargs
        return args[0]


def test_hook_takes_the_image_out_of_the_call() -> None:
    block, layer = random_block(), Recorder()
    layer.register_forward_pre_hook(AttendBeforeLayer(1, block), with_kwargs=True)
    features, weights = (image(seed=2), image(seed=3)), []
    layer(text(), "second", image_features=features, cross_attention_weights=weights, other=1)
    (hidden, second), kwargs = layer.seen
    expected, expected_weights = block(text(), features[1], True)
    assert torch.equal(hidden, expected)
    assert second == "second"
    assert kwargs == {"other": 1}
    assert len(weights) == 1
    assert torch.equal(weights[0], expected_weights)


@pytest.mark.parametrize("with_image", [False, True])
def test_hook_without_block_or_without_image_changes_nothing(with_image: bool) -> None:
    hook = AttendBeforeLayer(*((None, None) if with_image else (0, random_block())))
    layer = Recorder()
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    hidden = text()
    layer(hidden, other=1, **({"image_features": (image(),)} if with_image else {}))
    args, kwargs = layer.seen
    assert args[0] is hidden
    assert kwargs == {"other": 1}
