"""Attention whose backward pass is fast in bfloat16 on a CPU.

PyTorch's fused attention is the fastest forward pass there, but its backward pass is slower than
the matrix products it consists of (benchmarks/cpu_attention.py). So where a gradient will be
needed, the products are written out.

Shapes: B samples, Q query heads, K key/value heads, T queries, N keys, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

CPU_ATTENTION = "sdpa_or_products"


def sdpa_or_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as ``sdpa`` does; with plain products where bfloat16 is to be differentiated.

    Args:
        module: The attention layer.
        query: (B, Q, T, d).
        key: (B, K, N, d).
        value: (B, K, N, d).
        attention_mask: Broadcast to (B, Q, T, N): booleans, or what is added to the scores.
        scaling: Of the scores; 1 / sqrt(d) if not given.
        dropout: As for sdpa, which does all that is not plain attention.
        is_causal: As for sdpa.
        **kwargs: Likewise.

    Returns:
        (B, T, Q, d), and no weights.
    """
    differentiated = torch.is_grad_enabled() and (query.requires_grad or value.requires_grad)
    special = dropout or any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
    kind = query.device.type
    # Rotary embeddings leave float32 behind, which autocast rounds before fused attention.
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if not differentiated or special or precision != torch.bfloat16:
        output, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return output, None
    query, key, value = (states.to(precision) for states in (query, key, value))
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if attention_mask is None and is_causal and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        attention_mask = attention_mask[None, None]
    scale = width**-0.5 if scaling is None else scaling
    # Heads that share keys are one taller matrix: nothing is repeated.
    scores = (query * scale).reshape(batch, groups, -1, width) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.view(batch, heads, queries, keys)
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
        scores = scores.view(batch, groups, -1, keys)
    context = scores.softmax(dim=-1) @ value
    return context.view(batch, heads, queries, width).transpose(1, 2), None


AttentionInterface.register(CPU_ATTENTION, sdpa_or_products)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
