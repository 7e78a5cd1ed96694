"""Means with their confidence interval."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, or a difference of two, and where it lies.

    Attributes:
        mean: The mean; NaN if there are no samples.
        low: Lower end of the interval; NaN for fewer than two samples.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether it leaves zero out."""
        return self.low > 0 or self.high < 0


def mean_interval(values: NDArray[np.floating]) -> Interval:
    """Average samples, (n,), those that are not NaN.

    Samples that are all equal have an interval of no width: a ratio to itself is 1 for certain.
    """
    known = values[~np.isnan(values)].astype(np.float64)
    if len(known) < 2:
        return Interval(float(known.mean()) if len(known) else np.nan, np.nan, np.nan)
    return student_interval(
        float(known.mean()), float(known.var(ddof=1)) / len(known), len(known) - 1
    )


def student_interval(
    mean: float, variance: float, freedom: float, confidence: float = CONFIDENCE
) -> Interval:
    """Give Student's interval.

    Args:
        mean: The mean.
        variance: Of the mean.
        freedom: Degrees of it.
        confidence: Of the interval.
    """
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * variance**0.5
    return Interval(mean, mean - half, mean + half)


def mean_intervals(values: NDArray[np.floating]) -> list[Interval]:
    """Average samples of each column, (n, K)."""
    return [mean_interval(column) for column in values.T]
