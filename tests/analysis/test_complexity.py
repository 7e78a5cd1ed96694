"""The formulas at the paper's sizes, against what was worked out by hand from its text."""

import pytest

from hive_vision.analysis.complexity import Complexity

MOBILELLM = Complexity(
    language_layers=32, selected_layers=6, image_tokens=576, text_tokens=77, width=960
)


def test_equations_at_the_paper_s_sizes() -> None:
    tokens = 576 + 77
    assert MOBILELLM.self_attention == 32 * tokens**2 * 960 / 2 + 32 * tokens * 960**2
    assert MOBILELLM.hive == 32 * 6 * 960**2 + 32 * 77 * 960**2
    # Ratios as the notes on the paper give them.
    assert MOBILELLM.hive / MOBILELLM.self_attention == pytest.approx(0.095, abs=0.001)
    with_image = MOBILELLM.hive_with_image_tokens / MOBILELLM.self_attention
    assert with_image == pytest.approx(0.22, abs=0.01)


def test_without_an_image_hive_is_the_language_model() -> None:
    text_only = Complexity(32, 6, 0, 77, 960)
    assert text_only.hive_with_image_tokens == pytest.approx(text_only.self_attention)
