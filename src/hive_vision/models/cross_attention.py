"""The cross-attention block in front of a language-model layer (section 3.2, eq. for H_l).

Shapes: B captions, I images, T text tokens, N image tokens, E language-model width, Q query
heads, K key/value heads (grouped queries), d head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TanhGate(nn.Module):
    """A learned scalar gate, tanh(weight), that starts closed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Close the gate."""
        nn.init.zeros_(self.weight)

    def forward(self, update: Tensor) -> Tensor:
        """Scale the update (B, T, E)."""
        return torch.tanh(self.weight) * update


class CrossAttention(GradientCheckpointingLayer):
    """Pre-norm residual block: text queries, image keys and values.

    H + o(softmax(q(norm(H)) k(T)^T / sqrt(d)) v(T)), optionally times tanh(gate). Starts as
    an exact identity: with the output projection zero, or with the gate zero.

    Args:
        config: The `HiveConfig`; read for the options and the attention implementation.
        bias: Whether the four projections have a bias.
    """

    is_causal = False  # otherwise sdpa without a mask is causal

    def __init__(self, config: PreTrainedConfig, *, bias: bool) -> None:
        super().__init__()
        self.config = config
        size, heads, key_value_heads, self.head_dim = attention_geometry(config.text_config)
        self.num_key_value_groups = heads // key_value_heads
        self.scaling = self.head_dim**-0.5
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, key_value_heads * self.head_dim, bias=bias)
        qk_norm = config.cross_attention_qk_norm
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        gated = config.cross_attention_gate == "tanh"
        self.o_proj = (nn.Linear if gated else ZeroLinear)(heads * self.head_dim, size, bias=bias)
        self.gate = TanhGate() if gated else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        image: Tensor,
        output_weights: bool = False,
        image_mask: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Let the text look at the image.

        Args:
            hidden: Text states (B, T, E).
            image: Projected image features (I, N, E).
            output_weights: Also return the attention weights (computed eagerly).
            image_mask: False for image tokens that are padding (I, 1, 1, N); nobody sees those.
            image_index: Which of the I images each caption looks at (B,); its own if not given.

        Returns:
            New text states (B, T, E), and the weights (B, Q, T, N) if asked for.
        """
        query = self.q_norm(self._heads(self.q_proj(self.norm(hidden))))
        key = self.k_norm(self._heads(self.k_proj(image)))
        value = self._heads(self.v_proj(image))
        if image_index is not None:
            key, value = (rows_of_images(states, image_index) for states in (key, value))
            image_mask = None if image_mask is None else image_mask[image_index]
        attend: Callable[..., tuple[Tensor, Tensor | None]] = _eager_attention
        if not output_weights:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, _eager_attention
            )
        context, weights = attend(
            self, query, key, value, image_mask, scaling=self.scaling, dropout=0.0
        )
        update = self.gate(self.o_proj(context.reshape(*hidden.shape[:-1], -1)))
        return hidden + update, weights if output_weights else None

    def _heads(self, states: Tensor) -> Tensor:
        """(B, T, heads * d) to (B, heads, T, d)."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def is_identity(self) -> bool:
        """Whether no image content passes yet, so that the projector gets no gradient."""
        last = self.gate if isinstance(self.gate, TanhGate) else self.o_proj
        return not bool(torch.any(last.weight != 0))

    @torch.no_grad()
    def copy_from_host(self, host: nn.Module) -> None:
        """Start from the projections of the host layer's self-attention.

        The output projection is copied only under a gate: without one it stays zero.

        Args:
            host: The language-model layer.

        Raises:
            ValueError: If the host keeps q, k and v in one fused projection.
        """
        projections = host_projections(host)
        if projections is None:
            raise ValueError(
                f"{type(host).__name__} fuses its query, key and value projections, so they "
                "cannot be copied; set cross_attention_start to random"
            )
        names = ["q_proj", "k_proj", "v_proj"]
        if isinstance(self.gate, TanhGate) and "o_proj" in projections:
            names.append("o_proj")
        for name in names:
            ours, theirs = getattr(self, name), projections[name]
            ours.weight.copy_(theirs.weight)
            if theirs.bias is not None and ours.bias is not None:
                ours.bias.copy_(theirs.bias)


class AttendBeforeLayer:
    """Forward pre-hook of a language-model layer: runs its cross-attention first.

    The image features travel as keyword arguments of the call, never as module state; this
    hook takes them out, so that no host layer ever sees them.

    Args:
        index: Which of the selected depths this layer is; ``None`` if it is not one.
        cross_attention: The block to run there.
    """

    def __init__(self, index: int | None, cross_attention: nn.Module | None) -> None:
        self.index = index
        self.cross_attention = cross_attention

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the layer's input states by the cross-attended ones."""
        if "image_features" not in kwargs:
            return args, kwargs
        kwargs = dict(kwargs)
        image_features = kwargs.pop("image_features")
        image_mask = kwargs.pop("image_mask", None)
        image_index = kwargs.pop("image_index", None)
        weights_of_layers = kwargs.pop("cross_attention_weights", None)
        if self.cross_attention is None:
            return args, kwargs
        assert self.index is not None
        hidden, weights = self.cross_attention(
            args[0],
            image_features[self.index],
            weights_of_layers is not None,
            image_mask,
            image_index,
        )
        if weights_of_layers is not None:
            weights_of_layers.append(weights)
        return (hidden, *args[1:]), kwargs


def rows_of_images(states: Tensor, image_index: Tensor) -> Tensor:
    """Give every caption the states of its image: (I, ...) and (B,) to (B, ...).

    By an embedding, whose gradient sums an image's captions in the same order every time, on CPUs
    and on GPUs; those of ``index_select`` and of indexing do on one of them only.
    """
    rows = functional.embedding(image_index, states.flatten(1))
    return rows.view(-1, *states.shape[1:])


def attention_geometry(text_config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Read width, query heads, key/value heads and head width of a language model.

    Families without grouped queries or with a derived head width do not have those fields.
    """
    size, heads = text_config.hidden_size, text_config.num_attention_heads
    key_value_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim = getattr(text_config, "head_dim", None) or size // heads
    return size, heads, key_value_heads, head_dim


def host_projections(host: nn.Module) -> dict[str, nn.Linear] | None:
    """Find a layer's self-attention projections under our names; ``None`` if they are fused."""
    linears = {
        name.rpartition(".")[2]: module
        for name, module in host.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not {"q_proj", "k_proj", "v_proj"} <= linears.keys():
        return None
    found = {name: linears[name] for name in ("q_proj", "k_proj", "v_proj")}
    for output in ("o_proj", "out_proj", "dense"):
        if output in linears:
            return {**found, "o_proj": linears[output]}
    return found


def _eager_attention(
    module: CrossAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with weights: (B, Q, T, d) and (B, K, N, d) to (B, T, Q, d), (B, Q, T, N).

    The mask (B, 1, 1, N) is False where no one looks.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
