"""The projector g_l from encoder features to the language model's width (section 3.2).

Shapes: B images, N image tokens, D encoder width, H hidden width, E language-model width.
"""

from torch import Tensor, nn


class Projector(nn.Module):
    """LayerNorm, two-layer MLP with GELU, residual connection: T_llm = g(F).

    The residual path starts after the norm, so that the few huge activations of large
    encoders do not pass; it is linear where the widths differ.

    Args:
        in_size: D.
        hidden_size: H.
        out_size: E.
        norm: Normalise the features first.
        residual: Add the (normalised) features to the MLP's output.
    """

    def __init__(
        self, in_size: int, hidden_size: int, out_size: int, *, norm: bool, residual: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_size) if norm else nn.Identity()
        self.up = nn.Linear(in_size, hidden_size)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden_size, out_size)
        self.skip: nn.Module | None = None
        if residual:
            same_width = in_size == out_size
            self.skip = nn.Identity() if same_width else nn.Linear(in_size, out_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Project features (B, N, D) to (B, N, E)."""
        normed = self.norm(features)
        projected: Tensor = self.down(self.activation(self.up(normed)))
        return projected if self.skip is None else projected + self.skip(normed)
