"""Means over samples with their confidence interval."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies (95%, Student's t over the samples).

    Attributes:
        mean: Of the samples that are not NaN; NaN if there are none.
        low: Lower end; NaN for fewer than two samples.
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
    """Average samples, (n,)."""
    known = values[~np.isnan(values)].astype(np.float64)
    if len(known) < 2:
        return Interval(float(known.mean()) if len(known) else np.nan, np.nan, np.nan)
    mean, error = float(known.mean()), float(known.std(ddof=1) / len(known) ** 0.5)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def mean_intervals(values: NDArray[np.floating]) -> list[Interval]:
    """Average samples of each column, (n, K)."""
    return [mean_interval(column) for column in values.T]
