"""Replacement of samples that cannot be used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.data.replacement import BadSample, ReplacingDataset, UnusableSampleError


class Numbers(ReplacingDataset[tuple[int, list[BadSample]]]):
    """Rows as samples, numbered from 100."""

    def __init__(self, size: int, bad: set[int]) -> None:
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return self.size

    def read(self, row: int, bad: list[UnusableSampleError]) -> tuple[int, list[BadSample]]:
        if row in self.bad:
            raise UnusableSampleError(100 + row, f"file {row}", "broken")
        return row, [error.replaced_by(100 + row) for error in bad]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_good_ones_stay_and_bad_ones_are_named(drawn: tuple[int, set[int]]) -> None:
    size, bad = drawn
    data = Numbers(size, bad)
    if len(bad) > size // 2:
        return
    for row in range(size):
        used, replaced = data[row]
        assert used not in bad
        if row not in bad:
            assert (used, replaced) == (row, [])
            continue
        assert replaced[0] == BadSample(100 + row, f"file {row}", "broken", 100 + used)
        assert {sample.replaced_by for sample in replaced} == {100 + used}
        assert Numbers(size, bad)[row] == (used, replaced), "the same on every worker"


def test_two_bad_ones_have_replacements_of_their_own() -> None:
    data = Numbers(1000, {1, 2})
    assert data[1][0] != data[2][0]


def test_nothing_left() -> None:
    with pytest.raises(ValueError, match="sample 3 and 99 replacements cannot be used; the last"):
        Numbers(5, set(range(5)))[3]
