"""Means with their spread, and differences with an interval.

Shapes: S seeds, M test images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hive_vision.analysis.intervals import CONFIDENCE, Interval, student_interval

# Which images were classified correctly, or shares of a score from 0 to 1.
Scores: TypeAlias = NDArray[np.bool_] | NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """An accuracy and how sure it is.

    Attributes:
        mean: Over seeds and images, 0 to 1.
        deviation: Standard deviation over seeds; ``None`` where there is one, or none.
        image_error: Standard error of the mean from the choice of test images; where all are right,
            or all wrong, as if one more had been right and one wrong.
        seeds: How many.
        images: How many.
    """

    mean: float
    deviation: float | None
    image_error: float
    seeds: int
    images: int

    @property
    def spread(self) -> float:
        """Standard error and deviation together, as one number."""
        return float(np.hypot(self.image_error, self.deviation or 0.0))


def accuracy(correct: Scores) -> Accuracy:
    """Summarise which test images were classified correctly.

    Args:
        correct: (S, M).
    """
    seeds, images = correct.shape
    by_seed = correct.mean(axis=1)
    return Accuracy(
        mean=float(correct.mean()),
        deviation=float(by_seed.std(ddof=1)) if seeds > 1 else None,
        image_error=_image_error(correct.mean(axis=0)),
        seeds=seeds,
        images=images,
    )


def paired_difference(first: Scores, second: Scores, confidence: float = CONFIDENCE) -> Interval:
    """Subtract a method from another on the same seeds and the same test images.

    Both are samples, of the runs and of the images that one could have had. The variance of the
    mean difference is the sum of what comes from either (crossed random effects; the interaction
    is counted twice, which widens the interval a little), with Satterthwaite's degrees of freedom.
    Where all images and runs agree there is no variance to see: the interval is then Bonett and
    Price's (2012), as if one more image had spoken for each method.

    Args:
        first: (S, M) which images the first method classified correctly; one seed stands for a
            method without seeds.
        second: (S, M) of the second.
        confidence: Of the interval.

    Raises:
        ValueError: If they are not about the same seeds and images.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"results of {first.shape} and {second.shape} (seeds, images) cannot be paired; probe "
            "both with the same seeds and test images"
        )
    difference = first.astype(float) - second
    seeds, images = difference.shape
    parts = [(_variance_of_mean(difference.mean(axis=0)), images - 1)]
    if seeds > 1:
        parts.append((_variance_of_mean(difference.mean(axis=1)), seeds - 1))
    mean, variance = float(difference.mean()), sum(part for part, _ in parts)
    if variance == 0 or images == 1:
        return _unanimous(difference.mean(axis=0), confidence)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts if degrees)
    return student_interval(mean, variance, freedom, confidence)


def best(results: Mapping[str, Scores]) -> str | None:
    """Name the method that is better than each other one, if the intervals say that one is."""
    leader = max(results, key=lambda name: results[name].mean())
    others = [name for name in results if name != leader]
    better = all(paired_difference(results[leader], results[name]).low > 0 for name in others)
    return leader if others and better else None


def all_differences(
    results: Mapping[str, Scores],
) -> dict[tuple[str, str], Interval]:
    """Compare every method with every one before it."""
    return {
        (later, earlier): paired_difference(results[later], results[earlier])
        for earlier, later in combinations(results, 2)
    }


def _unanimous(by_image: NDArray[np.floating], confidence: float) -> Interval:
    """Give an interval where nothing varies: with one more image for each method."""
    count = len(by_image) + 2
    gains = float(by_image.clip(min=0).sum() + 1) / count
    losses = float(-by_image.clip(max=0).sum() + 1) / count
    centre = gains - losses
    error = ((gains + losses - centre**2) / count) ** 0.5
    half = float(stats.norm.ppf((1 + confidence) / 2)) * error
    mean = float(by_image.mean())
    return Interval(mean, max(-1.0, centre - half), min(1.0, centre + half))


def _image_error(by_image: NDArray[np.floating]) -> float:
    variance = _variance_of_mean(by_image)
    if variance == 0:
        count = len(by_image) + 2
        share = (float(by_image.sum()) + 1) / count
        variance = share * (1 - share) / count
    return float(variance**0.5)


def _variance_of_mean(values: NDArray[np.floating]) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0
