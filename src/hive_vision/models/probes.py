"""Heads that classify what a frozen encoder gives.

Shapes: B images, N tokens of one image, D encoder width, C classes.
"""

import torch
from torch import Tensor, nn


class LinearProbe(nn.Module):
    """A fresh LayerNorm on the tokens, one vector of them, one linear layer.

    As in the authors' classification script, whose encoder ends before its own final norm.

    Args:
        width: D.
        classes: C.
        pooling: ``mean`` of the tokens, or ``cls``, the first one.
    """

    def __init__(self, width: int, classes: int, pooling: str = "mean") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pooling = pooling
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify.

        Args:
            tokens: (B, N, D).
            mask: (B, N) true where a token is none of padding.

        Returns:
            Logits (B, C).
        """
        normed = self.norm(tokens)
        pooled = normed[:, 0] if self.pooling == "cls" else masked_mean(normed, mask)
        logits: Tensor = self.classifier(pooled)
        return logits


class AttentiveProbe(nn.Module):
    """A fresh LayerNorm, one learned query that attends to all tokens, one linear layer.

    What the paper's classification numbers use (authors' code, ``train_classification.py``), with
    its initialisation; no residual and no MLP after the attention, unlike SigLIP's own head.

    Args:
        width: D.
        classes: C.
        heads: Attention heads; the encoder's.
    """

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classifier = nn.Linear(width, classes)
        nn.init.xavier_uniform_(self.query)
        nn.init.xavier_uniform_(self.attention.in_proj_weight)
        nn.init.zeros_(self.attention.in_proj_bias)
        # LeCun: variance 1/D in, cut at two standard deviations.
        std = width**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.attention.out_proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify.

        Args:
            tokens: (B, N, D).
            mask: (B, N) true where a token is none of padding.

        Returns:
            Logits (B, C).
        """
        keys = self.norm(tokens)
        padding = None if mask is None else ~mask
        query = self.query.expand(len(tokens), -1, -1)
        pooled, _ = self.attention(query, keys, keys, padding, need_weights=False)
        logits: Tensor = self.classifier(pooled[:, 0])
        return logits


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Average tokens (B, N, D) over N, where ``mask`` (B, N) is true; (B, D)."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)
    return torch.einsum("bnd,bn->bd", tokens, weights) / weights.sum(dim=1, keepdim=True)
