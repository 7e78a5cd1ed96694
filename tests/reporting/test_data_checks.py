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
    speed_lines,
    speed_table,
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


def bench(takes: float | None = 200.0, **other: Any) -> dict[str, Any]:
    stage = {"name": "stage1", "per_second": takes, "source": "runs/x"}
    return {
        "unit": "captions",
        "key": "data.num_workers",
        "num_workers": 1,
        "processors": 4,
        "rates": {0: 100.0, 1: 80.0, 2: 150.0, 4: 300.0},
        "shares": {"reading and decoding": 0.5, "resizing": 0.4, "collating": 0.1},
        "image_side": 480,
        "resized_to": 384,
        "stages": [{**stage, "workers": 4, "is_estimate": False, "is_enough": False}],
        **other,
    }


class TestSpeed:
    def test_table(self) -> None:
        file = io.StringIO()
        Console(file=file, width=100).print(speed_table(bench()))
        text = file.getvalue()
        assert re.search(r"\b1 \(recipe\) +80 +0\.40", text)
        assert re.search(r"\b4 +300 +1\.50", text)

    def test_too_slow(self) -> None:
        shares, stage, verdict = speed_lines(bench())
        assert "resizing 40%" in shares
        assert stage == "stage1 takes 200 captions a second (runs/x): 4 workers are enough"
        assert verdict == (
            "The loader is the bottleneck: data.num_workers=1 gives 0.4 times what stage1 takes; "
            "set data.num_workers=4."
        )

    def test_large_images(self) -> None:
        verdict = speed_lines(bench(image_side=481))[-1]
        assert "hive-vision data build ... resize=384" in verdict
        assert "481 pixels" in verdict
        assert "resize" not in speed_lines(bench(image_side=481, resized_to=None))[-1]

    def test_too_few_processors(self) -> None:
        given = bench()
        given["stages"][0] |= {"workers": 9, "is_estimate": True}
        _, stage, verdict = speed_lines(given)
        assert stage.endswith("about 9 workers are needed")
        assert verdict.endswith(
            "set data.num_workers=9 on a machine with as many processors (here: 4)."
        )

    def test_fast_enough(self) -> None:
        given = bench(10.0)
        given["stages"][0] |= {"workers": 1, "is_enough": True}
        assert speed_lines(given)[1].endswith("1 worker is enough")
        assert speed_lines(given)[-1] == (
            "The loader is not the bottleneck: data.num_workers=1 gives 8.0 times what stage1 "
            "takes."
        )

    def test_without_workers_it_is_a_share(self) -> None:
        given = bench(50.0, num_workers=0)
        assert "data.num_workers=0 takes about 33% of the time of stage1" in speed_lines(given)[-1]

    def test_unknown(self) -> None:
        _, stage, verdict = speed_lines(bench(None))
        assert "known after a run" in stage
        assert "up to 300 captions a second" in verdict
