"""What a profile says, beside the paper's figures."""

from typing import Any

import pytest

from hive_vision.reporting.profile_tables import profile_report, scaling_figure


def method(scale: float, seconds: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "flops": {"vision": {"forward": 2e9, "backward": 0.0}},
        "flops_per_caption": 10e9 * scale,
        "flops_beside_vision": 8e9 * scale,
        "predicted_memory": 2**30,
    }
    if seconds:
        found |= {
            "counted_by_torch": 10.1e9 * scale,
            "seconds": seconds,
            "seconds_spread": [sorted(seconds)[1], min(seconds), max(seconds)],
            "parts": {"forward": 1.0, "backward": 2.0, "optimizer": 0.1},
            "share_of_ceiling": [0.5, 0.4, 0.6],
            "memory": 2**31 * scale,
        }
    return found


def made(hive: float = 0.5, measured: bool = True) -> dict[str, Any]:
    fast, slow = ([2.0, 1.0, 4.0], [4.0, 3.0, 6.0]) if measured else ([], [])
    methods = {"sa": method(1.0, slow), "hive": method(hive, fast)}
    return {
        **{"vision": "v", "language": "l", "device": "cpu", "precision": "bfloat16"},
        **{"batch": 2, "tokens": 9, "captions": {"source": "given"}},
        "loading": 0.5,
        "stages": [{"name": "stage1", "methods": methods}],
        "formulas": {
            **{"self_attention": 10.0, "hive": 1.0, "hive_with_image_tokens": 2.0},
            "image_tokens": 16,
        },
        "scaling": [
            {
                "image_tokens": image,
                "text_tokens": text,
                "flops": {"sa": 2e9 * image * text, "hive": 1e9 * image * text},
                "beside_vision": {"sa": 1e9 * image, "hive": 1e8 * image},
            }
            for image, text in ((16, 9), (64, 9), (16, 20))
        ],
    }


def cells(profile: dict[str, Any]) -> dict[str, list[str]]:
    _, grids = profile_report(profile)
    return {row[0].text: [cell.text for cell in row[1:]] for grid in grids for row in grid.rows}


def test_numbers_stand_in_their_rows() -> None:
    found = cells(made())
    assert found["vision"] == ["2 + 0", "2 + 0"]
    assert found["all"] == ["10", "5"]
    assert found["stage1 sa"] == [
        "4",
        "3 - 6",
        "1",
        "2",
        "0.1",
        "20%",
        "50%",
        "2.00 (1.00)",
        "+1.0%",
    ]
    # Of each turn: 4 / 2, 3 / 1 and 6 / 4.
    assert found["stage1"] == ["0.50", "0.50", "2.00 (1.50 - 3.00)", "0.50"]
    assert found["paper's tables 6, 8, 9"] == ["0.14", "0.14", "3.43", "0.41"]
    assert found["hive: L_l L_s d^2 + L_l N_t d^2 (eqs. 3, 5)"] == ["1", "0.100"]


@pytest.mark.parametrize(
    ("hive", "words"), [(0.5, "more than"), (0.01, "less than"), (0.14, "around")]
)
def test_the_paper_s_figure_is_judged(hive: float, words: str) -> None:
    note, _ = profile_report(made(hive))
    assert f"{words} the paper's 0.14" in note.replace("this is what", "") or words == "around"
    assert ("around the paper's 0.14" in note) == (words == "around")


def test_loading_is_said_or_said_to_be_missing() -> None:
    assert "Loading: share of a step" in profile_report(made())[0]
    elsewhere = {**made(), "loading": None}
    assert cells(elsewhere)["stage1 sa"][5] == "-"
    assert "Loading: not measured" in profile_report(elsewhere)[0]


def test_without_measurements_there_are_no_times() -> None:
    note, grids = profile_report(made(measured=False))
    assert "Time" not in note
    assert not any("s per step" in grid.headings for grid in grids)
    assert cells(made(measured=False))["stage1"][2:] == ["-", "-"]


def test_figure_has_a_line_for_each_method_and_part() -> None:
    left, right = scaling_figure(made()).axes
    assert len(left.lines) == len(right.lines) == 4
    assert list(left.lines[0].get_xdata()) == [16, 64]
    assert list(right.lines[0].get_xdata()) == [9, 20]
    assert list(left.lines[0].get_ydata()) == [2 * 16 * 9, 2 * 64 * 9]
