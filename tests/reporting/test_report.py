"""The parts of a report, before they are HTML or Markdown."""

import pytest

from hive_vision.reporting.report import Picture, Section, in_words
from tests.reporting.run_folders import png


@pytest.mark.parametrize(
    ("title", "anchor"), [("What was run", "what-was-run"), ("A (b): c/d!", "a-b-c-d")]
)
def test_an_anchor_is_a_plain_word(title: str, anchor: str) -> None:
    assert Section(title, []).anchor == anchor


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), ("abc", "a, b and c")]
)
def test_names_in_words(names: list[str], text: str) -> None:
    assert in_words(list(names)) == text


@pytest.mark.parametrize(("width", "is_wide"), [(80, False), (81, True)])
def test_a_row_of_maps_is_wide(width: int, is_wide: bool) -> None:
    assert Picture("title", "alt", png(width, 40)).is_wide == is_wide
