"""Means, spreads and intervals against scipy, and against what they are to cover."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from hive_vision.analysis.intervals import Interval
from hive_vision.evaluation.statistics import (
    accuracy,
    all_differences,
    best,
    paired_difference,
)

Correct = NDArray[np.bool_]


def drawn(seeds: int, images: int, share: float, seed: int) -> Correct:
    return np.random.default_rng(seed).random((seeds, images)) < share


shapes = st.tuples(st.integers(1, 5), st.integers(2, 30), st.integers(0, 999))
pairs = shapes.map(
    lambda shape: (drawn(*shape[:2], 0.7, shape[2]), drawn(*shape[:2], 0.5, shape[2] + 1))
)


def close(found: Interval, low: float, high: float) -> None:
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.mean == pytest.approx((low + high) / 2)


class TestAccuracy:
    @settings(max_examples=40, deadline=None)
    @given(shapes)
    def test_numbers(self, shape: tuple[int, int, int]) -> None:
        seeds, images, seed = shape
        correct = drawn(seeds, images, 0.6, seed)
        found = accuracy(correct)
        assert found.mean == pytest.approx(sum(map(sum, correct.tolist())) / seeds / images)
        if len(np.unique(correct.mean(axis=0))) > 1:
            assert found.image_error == pytest.approx(stats.sem(correct.mean(axis=0)))
        assert (found.seeds, found.images) == (seeds, images)
        if seeds == 1:
            assert found.deviation is None
            assert found.spread == found.image_error
        else:
            assert found.deviation == pytest.approx(stats.tstd(correct.mean(axis=1)))
            assert found.spread**2 == pytest.approx(found.image_error**2 + found.deviation**2)

    def test_one_seed_has_the_error_of_a_share(self) -> None:
        found = accuracy(np.arange(100)[None] < 80)
        assert found.mean == 0.8
        assert found.image_error == pytest.approx((0.8 * 0.2 / 99) ** 0.5)

    def test_one_image(self) -> None:
        found = accuracy(np.array([[True], [False]]))
        assert found.mean == 0.5
        assert found.image_error == pytest.approx((0.5 * 0.5 / 3) ** 0.5)

    @pytest.mark.parametrize("right", [True, False])
    def test_all_alike_is_not_certain(self, right: bool) -> None:
        """Of 18 images, as if 19 of 20 had been the same."""
        found = accuracy(np.full((3, 18), right))
        assert found.mean == right
        assert found.image_error == pytest.approx((0.95 * 0.05 / 20) ** 0.5)

    def test_seeds_do_not_make_images(self) -> None:
        """Twenty equal heads say no more about images than one."""
        one = drawn(1, 200, 0.7, 0)
        many = accuracy(np.repeat(one, 20, axis=0))
        assert (many.image_error, many.deviation) == (accuracy(one).image_error, 0)


class TestUnanimous:
    """Where nothing varies, as few images must not look like certainty."""

    @pytest.mark.parametrize(("images", "certain"), [(1, False), (2, False), (5, True), (50, True)])
    def test_every_image_for_one(self, images: int, certain: bool) -> None:
        right, wrong = np.ones((3, images), bool), np.zeros((3, images), bool)
        found = paired_difference(right, wrong)
        assert found.mean == found.high == 1
        assert found.low < 1
        assert found.is_certain == certain
        other = paired_difference(wrong, right)
        assert (other.low, other.high) == pytest.approx((-found.high, -found.low))

    def test_no_image_for_either(self) -> None:
        """Bonett and Price's interval for paired shares, written out."""
        same = drawn(2, 98, 0.5, 0)[:1].repeat(2, axis=0)
        found = paired_difference(same, same)
        half = stats.norm.ppf(0.975) * (2 / 100 / 100) ** 0.5
        assert (found.mean, found.low, found.high) == pytest.approx((0, -half, half))

    def test_one_image_on_which_runs_differ(self) -> None:
        found = paired_difference(np.array([[True], [True]]), np.array([[False], [True]]))
        assert not found.is_certain


class TestPairedDifference:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(3, 200), st.integers(0, 99), st.sampled_from([0.8, 0.95, 0.99]))
    def test_one_seed_is_a_paired_test_over_images(
        self, images: int, seed: int, confidence: float
    ) -> None:
        first, second = drawn(1, images, 0.7, seed), drawn(1, images, 0.5, seed + 500)
        assume(len(np.unique(first.astype(int) - second)) > 1)
        expected = stats.ttest_rel(first[0].astype(float), second[0].astype(float))
        close(
            paired_difference(first, second, confidence), *expected.confidence_interval(confidence)
        )

    def test_seeds_alone(self) -> None:
        """Every image says the same of a seed: a test over seeds."""
        by_seed = np.array([1, 0, 1, 1, 0, -1])
        first = np.repeat(by_seed[:, None] == 1, 50, axis=1)
        second = np.repeat(by_seed[:, None] == -1, 50, axis=1)
        expected = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
        close(paired_difference(first, second), *expected)

    def test_images_alone(self) -> None:
        """Every seed says the same of an image: a test over images, however many seeds."""
        first, second = drawn(1, 80, 0.7, 0), drawn(1, 80, 0.5, 1)
        expected = stats.ttest_rel(first[0].astype(float), second[0].astype(float))
        many = [np.repeat(correct, 4, axis=0) for correct in (first, second)]
        close(paired_difference(*many), *expected.confidence_interval(0.95))

    def test_both_together(self) -> None:
        """The variances add up; the freedom is Satterthwaite's."""
        first, second = drawn(3, 40, 0.8, 0), drawn(3, 40, 0.5, 1)
        difference = first.astype(float) - second
        images, seeds = (stats.sem(difference.mean(axis=axis)) ** 2 for axis in (0, 1))
        freedom = (images + seeds) ** 2 / (images**2 / 39 + seeds**2 / 2)
        low, high = stats.t.interval(
            0.95, freedom, loc=difference.mean(), scale=(images + seeds) ** 0.5
        )
        assert 2 < freedom < 41
        close(paired_difference(first, second), low, high)

    @pytest.mark.parametrize(
        ("seeds", "seed_spread"), [(1, 0.0), (3, 0.0), (3, 0.05), (5, 0.05), (8, 0.02)]
    )
    def test_covers_the_true_difference(self, seeds: int, seed_spread: float) -> None:
        """95% of the intervals have it inside, or a little more; images and seeds both random."""
        random = np.random.default_rng(0)
        images, runs, true = 150, 400, 0.05
        inside = 0
        for _ in range(runs):
            easy = random.uniform(0.25, 0.75, images)
            better = true + random.normal(0, seed_spread, (seeds, 1))
            other = random.normal(0, seed_spread, (seeds, 1))
            noise = random.random((2, seeds, images))
            found = paired_difference(noise[0] < easy + better, noise[1] < easy + other)
            inside += found.low <= true <= found.high
        assert 0.925 <= inside / runs <= 0.997

    def test_pairing_helps(self) -> None:
        """Errors on the same images leave less doubt than errors on any."""
        second = drawn(3, 300, 0.6, 0)
        first = second | drawn(3, 300, 0.1, 1)
        paired = paired_difference(first, second)
        shuffled = paired_difference(first, np.random.default_rng(2).permuted(second, axis=1))
        assert paired.high - paired.low < 0.7 * (shuffled.high - shuffled.low)
        assert paired.is_certain

    @settings(max_examples=40, deadline=None)
    @given(pairs)
    def test_properties(self, pair: tuple[Correct, Correct]) -> None:
        first, second = pair
        found = paired_difference(first, second)
        assert found.mean == pytest.approx(first.mean() - second.mean())
        assert found.low <= found.mean <= found.high
        back = paired_difference(second, first)
        assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
        order = np.random.default_rng(0).permutation(first.shape[1])
        again = paired_difference(first[::-1][:, order], second[::-1][:, order])
        assert (again.low, again.high) == pytest.approx((found.low, found.high))
        widths = [
            wide.high - wide.low
            for wide in (paired_difference(first, second, share) for share in (0.5, 0.9, 0.99))
        ]
        assert all(narrow <= wide for narrow, wide in pairwise(widths))

    @settings(max_examples=20, deadline=None)
    @given(shapes)
    def test_identical_results(self, shape: tuple[int, int, int]) -> None:
        correct = drawn(*shape[:2], 0.6, shape[2])
        found = paired_difference(correct, correct)
        assert found.mean == 0
        assert found.low == pytest.approx(-found.high)
        assert not found.is_certain

    @pytest.mark.parametrize("other", [(2, 20), (3, 19), (1, 20)])
    def test_results_that_are_no_pair(self, other: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="cannot be paired") as failure:
            paired_difference(drawn(3, 20, 0.5, 0), drawn(*other, 0.5, 1))
        assert "\n" not in str(failure.value)
        assert str(other) in str(failure.value)
        assert "(3, 20)" in str(failure.value)


class TestSeveral:
    base = drawn(3, 400, 0.6, 0)
    better = base | drawn(3, 400, 0.3, 1)
    a_bit_better = base | (np.arange(400) == np.argmin(base.all(axis=0)))

    def test_best_is_better_than_each(self) -> None:
        results = {"base": self.base, "other": self.a_bit_better, "hive": self.better}
        assert best(results) == "hive"
        assert best(dict(reversed(results.items()))) == "hive"

    def test_nobody_is_best_by_chance(self) -> None:
        assert self.a_bit_better.mean() > self.base.mean()
        assert best({"base": self.base, "hive": self.a_bit_better}) is None

    def test_nobody_is_best_who_is_not_better_than_each(self) -> None:
        nearly = self.better.copy()
        nearly[0, np.flatnonzero(nearly[0])[0]] = False
        results = {"base": self.base, "hive": self.better, "nearly": nearly}
        assert paired_difference(self.better, self.base).low > 0
        assert best(results) is None

    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
    def test_equal_ones_and_a_single_one(self, names: list[str]) -> None:
        assert best(dict.fromkeys(names, self.base)) is None

    def test_every_one_with_every_one_before_it(self) -> None:
        results = {"base": self.base, "other": self.a_bit_better, "hive": self.better}
        found = all_differences(results)
        assert found == {
            pair: paired_difference(results[pair[0]], results[pair[1]])
            for pair in (("other", "base"), ("hive", "base"), ("hive", "other"))
        }
        assert found["hive", "base"].mean > 0
