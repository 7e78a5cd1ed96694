"""The paper's complexity formulas, and what they leave out (sections 3.7 and 8.1, Table 7).

Symbols: L_l language-model layers, L_s selected encoder layers, N_v image tokens, N_t text tokens,
N = N_v + N_t, d the language model's width. The values are orders of magnitude, not operations.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Complexity:
    """The sizes that the formulas are about.

    Attributes:
        language_layers: L_l.
        selected_layers: L_s.
        image_tokens: N_v.
        text_tokens: N_t.
        width: d.
    """

    language_layers: int
    selected_layers: int
    image_tokens: int
    text_tokens: float
    width: int

    @property
    def self_attention(self) -> float:
        """Equations 2 and 4: L_l N^2 d / 2 + L_l N d^2."""
        tokens = self.image_tokens + self.text_tokens
        return self.language_layers * self.width * tokens * (tokens / 2 + self.width)

    @property
    def hive(self) -> float:
        """Equations 3 and 5: L_l L_s d^2 + L_l N_t d^2."""
        return self.language_layers * self.width**2 * (self.selected_layers + self.text_tokens)

    @property
    def hive_with_image_tokens(self) -> float:
        """Equation 5 with keys and values of all image tokens, where images are attended to.

        The first term of equation 5 has neither N_v nor a reason for L_l: L_s blocks project N_v
        tokens each and N_t text tokens look at them, L_s N_v d^2 + L_s N_t N_v d, and the language
        model attends to its text, L_l N_t^2 d / 2 + L_l N_t d^2.
        """
        text = self.language_layers * self.width * self.text_tokens
        image = self.selected_layers * self.width * self.image_tokens
        return image * (self.width + self.text_tokens) + text * (self.text_tokens / 2 + self.width)
