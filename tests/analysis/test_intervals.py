"""Intervals, against scipy's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hive_vision.analysis.intervals import Interval, mean_interval


@given(seed=st.integers(0, 10**6), count=st.integers(2, 60))
@settings(max_examples=30, deadline=None)
def test_interval_is_students(seed: int, count: int) -> None:
    values = np.random.default_rng(seed).normal(3, 2, count)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    with_gaps = np.insert(values, [0, count // 2], np.nan)
    assert mean_interval(with_gaps) == found


def test_too_few() -> None:
    one, none = mean_interval(np.array([2.0, np.nan])), mean_interval(np.array([np.nan]))
    assert one.mean == 2
    assert np.isnan([one.low, one.high, none.mean, none.low, none.high]).all()
    assert not one.is_certain


def test_certain_is_without_zero() -> None:
    assert Interval(1, 0.1, 2).is_certain
    assert Interval(-1, -2, -0.1).is_certain
    assert not Interval(1, -0.1, 2).is_certain
