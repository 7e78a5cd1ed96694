"""What is allocated during the work counts, at its fullest moment."""

import torch

from hive_vision.analysis.measuring import measure_peak

MEGABYTE = 2**20


def megabyte() -> torch.Tensor:
    return torch.zeros(MEGABYTE, dtype=torch.uint8)


def test_the_fullest_moment_counts() -> None:
    def work() -> None:
        kept = [megabyte() for _ in range(5)]
        del kept
        kept = [megabyte() for _ in range(3)]
        assert len(kept) == 3

    assert 5 * MEGABYTE <= measure_peak(work) < 5.1 * MEGABYTE


def test_what_was_there_before_does_not_count() -> None:
    before = [megabyte() for _ in range(3)]
    assert MEGABYTE <= measure_peak(megabyte) < 1.1 * MEGABYTE
    assert len(before) == 3
