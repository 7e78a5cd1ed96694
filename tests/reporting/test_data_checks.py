"""What `hive-vision data` prints."""

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hive_vision.reporting.data_checks import (
    EXAMPLES,
    data_table,
    problem_lines,
    share_line,
    token_line,
)

TOKENS = [
    ("<s>", "read"),
    *[("<image>", "read")] * 36,
    ("·a", "learned"),
    ("·cat", "learned"),
    ("</s>", "learned"),
    ("</s>", "padding"),
    ("</s>", "padding"),
]
USES = st.sampled_from(["learned", "read", "padding"])


def part(**other: Any) -> dict[str, Any]:
    return {
        "images": 12345,
        "captions": 61725,
        "usable_captions": 61000,
        "unusable_images": 17,
        "empty_captions": 23,
        "image_size": {"smallest": [8, 9], "median": [480, 640], "largest": [5000, 4000]},
        "caption_tokens": {"median": 21, "percentile_95": 36, "longest": 150},
        "max_text_tokens": 77,
        "cut_captions": 1234,
        "cut_share": 0.02,
        "duplicate_images": 31,
        "duplicate_pairs": 5,
    } | other


def rendered(content: Any, width: int = 100, colour: bool = False) -> str:
    system = "truecolor" if colour else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=colour)
    console.print(content)
    return console.file.getvalue()


def test_table_has_every_number() -> None:
    empty = part(image_size=None, caption_tokens=None, images=0)
    text = rendered(data_table({"train": part(), "held_out": empty, "held_out_images_in_train": 9}))
    for number in ("12,345", "61,725", "61,000", "8 x 9", "480 x 640", "5000 x 4000", "21", "36"):
        assert number in text
    for number in ("150", "1,234 (2.0%)", "31", " 5 ", " 9 ", "cut at 77", "17", "23"):
        assert number in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"longest +150 +-", text)


@pytest.mark.parametrize("count", [1, EXAMPLES, EXAMPLES + 3])
def test_first_problems_are_named(count: int) -> None:
    problem = {"source": "photos", "row": 1, "image": "a.jpg", "caption": None, "reason": "gone"}
    lines = problem_lines([problem] * count)
    assert lines[0].strip() == "photos: a.jpg: gone"
    assert (lines[-1].strip() == "... and 3 more") == (count > EXAMPLES)
    assert len(lines) <= EXAMPLES + 1


def test_learned_tokens_are_marked_without_colours() -> None:
    line = token_line(TOKENS, colour=False)
    assert line.plain == "<s> <image> x36 [·a] [·cat] [</s>] </s> </s>"


def test_learned_tokens_are_green() -> None:
    line = token_line(TOKENS, colour=True)
    assert line.plain == "<s> <image> x36 ·a ·cat </s> </s> </s>"
    green = [line.plain[span.start : span.end] for span in line.spans if "green" in span.style]
    assert green == ["·a", "·cat", "</s>"]
    assert "\x1b[1;32m·cat" in rendered(line, colour=True)


@given(st.lists(st.tuples(st.sampled_from(["a", "[b]", "·c"]), USES), max_size=40))
def test_no_token_is_lost(tokens: list[tuple[str, str]]) -> None:
    """Spelled out again, the line without colours has all tokens and the use of each."""
    found = []
    words = token_line(tokens, colour=False).plain.split()
    for word in words:
        if re.fullmatch(r"x\d+", word):
            found += [found[-1]] * (int(word[1:]) - 1)
        else:
            found.append(word)
    assert found == [f"[{text}]" if use == "learned" else text for text, use in tokens]


def test_shares() -> None:
    assert share_line(TOKENS) == ("42 tokens: 3 learned (7%), 37 read (88%), 2 padding (5%)")
    assert share_line([]).startswith("0 tokens")
