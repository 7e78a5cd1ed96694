"""The HIVE forward pass once more, in plain PyTorch from the paper's equations.

Of the host models only their own pieces are used: the encoder's ``output_hidden_states``,
and the language model's embeddings, layers (called one by one), final norm and head. Nothing
of hive_vision is: weights come from the state dict, options are arguments.

Shapes: B images with one caption each, T text tokens, N image tokens, D encoder width,
E language-model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Options:
    """What the state dict does not say."""

    encoder_layers: Sequence[int]
    host_layers: Sequence[int]
    norm: bool
    residual: bool
    shared: bool
    qk_norm: bool
    gated: bool


def reference_logits(
    vision_model: PreTrainedModel,
    language_model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    options: Options,
    pixel_values: Tensor,
    input_ids: Tensor,
) -> Tensor:
    """Logits (B, T, V) of captions without padding."""
    hidden_states = vision_model(pixel_values, output_hidden_states=True).hidden_states
    projected = []
    for index, layer in enumerate(options.encoder_layers):
        prefix = f"projectors.{0 if options.shared else index}."
        # hidden_states[0] is the embedding, so hidden_states[l] is F_l
        projected.append(_project(hidden_states[layer], _below(weights, prefix), options))

    pieces = _Pieces(language_model, input_ids)
    hidden = pieces.embedded
    for number, layer in enumerate(pieces.layers, start=1):
        if number in options.host_layers:
            index = options.host_layers.index(number)
            block = _below(weights, f"cross_attentions.{index}.")
            hidden = _attend(hidden, projected[index], block, options, pieces.head_counts)
        hidden = layer(hidden, **pieces.layer_arguments(number))
    logits = language_model.get_output_embeddings()(pieces.final_norm(hidden))
    cap = getattr(language_model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _project(features: Tensor, weights: Mapping[str, Tensor], options: Options) -> Tensor:
    """T = g(F), (B, N, D) to (B, N, E)."""
    x = features
    if options.norm:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * weights["norm.weight"] + weights["norm.bias"]
    hidden = _linear(x, weights, "up")
    hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))  # GELU
    result = _linear(hidden, weights, "down")
    return result + _linear(x, weights, "skip") if options.residual else result


def _attend(
    hidden: Tensor,
    image: Tensor,
    weights: Mapping[str, Tensor],
    options: Options,
    head_counts: tuple[int, int],
) -> Tensor:
    """H + o(softmax(Q K^T / sqrt(d)) V), one head after the other."""
    heads, key_value_heads = head_counts
    query = _linear(_rms_norm(hidden, weights["norm.weight"]), weights, "q_proj").chunk(heads, -1)
    key = _linear(image, weights, "k_proj").chunk(key_value_heads, -1)
    value = _linear(image, weights, "v_proj").chunk(key_value_heads, -1)
    contexts = []
    for head, q in enumerate(query):
        shared = head * key_value_heads // heads
        k, v = key[shared], value[shared]
        if options.qk_norm:
            q = _rms_norm(q, weights["q_norm.weight"])
            k = _rms_norm(k, weights["k_norm.weight"])
        scores = torch.matmul(q, k.transpose(1, 2)) / q.shape[-1] ** 0.5
        contexts.append(torch.matmul(scores.softmax(dim=-1), v))
    update = _linear(torch.cat(contexts, dim=-1), weights, "o_proj")
    return hidden + (torch.tanh(weights["gate.weight"]) * update if options.gated else update)


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    result = torch.matmul(x, weights[f"{name}.weight"].T)
    bias = weights.get(f"{name}.bias")
    return result if bias is None else result + bias


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


class _Pieces:
    """A language model taken apart; the families differ in names and in how positions enter."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        self.config = model.config
        self.family = model.config.model_type
        trunk: Any = model.base_model.decoder if self.family == "opt" else model.base_model
        self.layers: nn.ModuleList = trunk.layers
        self.head_counts = (
            self.config.num_attention_heads,
            getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads,
        )
        length = input_ids.shape[1]
        self.positions = torch.arange(length)[None]
        self.mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        self.rotary: dict[str | None, Any] = {}
        if self.family == "opt":
            self.embedded = trunk.embed_tokens(input_ids) + trunk.embed_positions(
                torch.ones_like(input_ids), position_ids=self.positions
            )
            self.final_norm = trunk.final_layer_norm
        elif self.family == "gpt_neox":
            self.embedded = trunk.embed_in(input_ids)
            self.final_norm = trunk.final_layer_norm
            self.rotary[None] = trunk.rotary_emb(self.embedded, self.positions)
        else:
            self.embedded = trunk.embed_tokens(input_ids)
            self.final_norm = trunk.norm
            kinds = set(self.config.layer_types) if self.family == "gemma3_text" else {None}
            for kind in kinds:
                extra = () if kind is None else (kind,)
                self.rotary[kind] = trunk.rotary_emb(self.embedded, self.positions, *extra)

    def layer_arguments(self, number: int) -> dict[str, Any]:
        """Keyword arguments of the 1-based layer."""
        arguments: dict[str, Any] = {"attention_mask": self.mask, "position_ids": self.positions}
        if self.family == "opt":
            return arguments
        kind = self.config.layer_types[number - 1] if self.family == "gemma3_text" else None
        return {**arguments, "position_embeddings": self.rotary[kind]}
