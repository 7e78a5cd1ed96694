"""The order of the data: complete, seeded, bucketed, and the same on any machine."""

from itertools import islice

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hive_vision.data.sampler import WINDOW_SHARDS, LengthBucketedSampler, OrderedPart

thorough = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.integers(1, 150)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31 - 1)


def lengths_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 78, size)


def global_batches(size: int, batch_size: int, num_batches: int, seed: int = 0) -> np.ndarray:
    sampler = LengthBucketedSampler(lengths_of(size), batch_size, num_batches, seed)
    return np.array(list(sampler.batches()))


def plain_batches(lengths: np.ndarray, batch_size: int, num_batches: int, seed: int) -> list:
    """The order of a single source as version 0.1 had it, written down in the plainest way."""
    size, batches, first = len(lengths), [], 0
    epochs = num_batches * batch_size // size + 2
    stream = [np.random.default_rng([seed, 0, epoch]).permutation(size) for epoch in range(epochs)]
    rows = np.concatenate(stream)
    while len(batches) < num_batches:
        epoch = first * batch_size // size
        epoch_end = -(-(epoch + 1) * size // batch_size)
        count = min(32, epoch_end - first)
        pool = rows[first * batch_size : (first + count) * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(count, batch_size)
        batches += pool[np.random.default_rng([seed, 1, first]).permutation(count)].tolist()
        first += count
    return batches[:num_batches]


@given(size=sizes, batch_size=batch_sizes, num_batches=st.integers(1, 120), seed=seeds)
@thorough
def test_a_single_source_keeps_the_order_of_older_runs(
    size: int, batch_size: int, num_batches: int, seed: int
) -> None:
    expected = plain_batches(lengths_of(size), batch_size, num_batches, seed)
    assert global_batches(size, batch_size, num_batches, seed).tolist() == expected
    one_part = LengthBucketedSampler(
        lengths_of(size), batch_size, num_batches, seed, [OrderedPart(size)]
    )
    assert np.array(list(one_part.batches())).tolist() == expected


@given(size=sizes, batch_size=batch_sizes, seed=seeds)
@thorough
def test_whole_epochs_hold_each_sample_equally_often(size: int, batch_size: int, seed: int) -> None:
    # size batches are batch_size epochs, whatever the two numbers are.
    batches = global_batches(size, batch_size, num_batches=size, seed=seed)
    assert batches.shape == (size, batch_size)
    assert np.bincount(batches.ravel(), minlength=size).tolist() == [batch_size] * size


@given(batches=st.integers(1, 100), batch_size=st.integers(1, 6), seed=seeds)
@thorough
def test_an_epoch_that_batches_fill_holds_each_sample_once(
    batches: int, batch_size: int, seed: int
) -> None:
    size = batches * batch_size
    given_out = global_batches(size, batch_size, num_batches=3 * batches, seed=seed)
    for epoch in np.split(given_out, 3):
        assert sorted(epoch.ravel()) == list(range(size))


@given(size=sizes, batch_size=batch_sizes, num_batches=st.integers(0, 120), seed=seeds)
@thorough
def test_no_sample_is_ahead_by_two_epochs(
    size: int, batch_size: int, num_batches: int, seed: int
) -> None:
    batches = global_batches(size, batch_size, num_batches, seed)
    seen = np.bincount(batches.ravel().astype(int), minlength=size)
    assert seen.sum() == num_batches * batch_size
    assert seen.max() - seen.min() <= 2


@given(
    size=sizes,
    batch_size=batch_sizes,
    num_batches=st.integers(1, 120),
    more=st.integers(1, 120),
    seed=seeds,
)
@thorough
def test_a_batch_does_not_depend_on_how_many_follow(
    size: int, batch_size: int, num_batches: int, more: int, seed: int
) -> None:
    short = global_batches(size, batch_size, num_batches, seed)
    long = global_batches(size, batch_size, num_batches + more, seed)
    np.testing.assert_array_equal(long[:num_batches], short)


@given(size=sizes, batch_size=batch_sizes, num_batches=st.integers(0, 60), seed=seeds)
@thorough
def test_iterating_gives_the_batches_one_after_another(
    size: int, batch_size: int, num_batches: int, seed: int
) -> None:
    sampler = LengthBucketedSampler(lengths_of(size), batch_size, num_batches, seed)
    rows = list(sampler)
    assert len(rows) == len(sampler) == num_batches * batch_size
    assert all(type(row) is int and 0 <= row < size for row in rows)
    assert rows == [row for batch in sampler.batches() for row in batch]


def test_pure_function_of_its_arguments() -> None:
    sampler = LengthBucketedSampler(lengths_of(500), 16, 100, seed=3)
    first = list(sampler)
    np.random.seed(1)  # whatever else draws random numbers
    assert list(sampler) == first
    assert list(LengthBucketedSampler(lengths_of(500), 16, 100, seed=3)) == first
    half_read = iter(sampler)
    assert list(islice(half_read, 50)) == first[:50]
    assert list(sampler) == first
    assert list(half_read) == first[50:]


def test_seed_and_epoch_change_the_order() -> None:
    one, other = global_batches(320, 16, 40, seed=0), global_batches(320, 16, 40, seed=1)
    assert (one != other).any(axis=1).all()
    first, second = np.split(one, 2)
    assert (first != second).any(axis=1).all()


def padding(lengths: np.ndarray, batches: np.ndarray) -> float:
    """Share of a padded batch that is padding."""
    widths = lengths[batches].max(axis=1) * batches.shape[1]
    return 1 - lengths[batches].sum() / widths.sum()


@pytest.mark.parametrize(("size", "batch_size"), [(5000, 32), (2048, 16), (1111, 8)])
def test_batches_hold_captions_of_similar_length(size: int, batch_size: int) -> None:
    lengths = lengths_of(size)
    bucketed = global_batches(size, batch_size, num_batches=size // batch_size)
    order = np.random.default_rng(0).permutation(size)[: bucketed.size]
    unbucketed = order.reshape(bucketed.shape)
    assert padding(lengths, unbucketed) > 0.35
    assert padding(lengths, bucketed) < 0.08


def test_a_batch_is_not_always_the_same_captions() -> None:
    # Sorting whole epochs would put the same neighbours together every time.
    batches = global_batches(640, 8, num_batches=160)
    first, second = ({frozenset(batch) for batch in part} for part in np.split(batches, 2))
    assert not first & second


def test_long_and_short_batches_are_mixed() -> None:
    # Sorted pools without a shuffle would train on short captions first, again and again.
    lengths = lengths_of(2048)
    widths = lengths[global_batches(2048, 16, num_batches=128)].max(axis=1)
    assert (np.diff(widths) < 0).mean() > 0.3


@pytest.mark.parametrize("size", [1, 2, 7, 15])
def test_fewer_samples_than_a_batch(size: int) -> None:
    batches = global_batches(size, batch_size=16, num_batches=size * 3)
    assert batches.shape == (size * 3, 16)
    assert np.bincount(batches.ravel()).tolist() == [48] * size
    for batch in batches:
        seen = np.bincount(batch, minlength=size)
        assert seen.max() - seen.min() <= 2


def identity(rows: list[int]) -> list[int]:
    return rows


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_sharding_keeps_the_global_batches(processes: int, accumulation: int, workers: int) -> None:
    """As transformers' trainer: micro-batches go round the processes, then accumulate."""
    batch_size, num_batches, size = 16, 40, 100
    expected = global_batches(size, batch_size, num_batches)
    micro = batch_size // (processes * accumulation)
    shards = []
    for process in range(processes):
        sampler = LengthBucketedSampler(lengths_of(size), batch_size, num_batches, seed=0)
        plain = DataLoader(range(size), micro, sampler=sampler, collate_fn=identity)
        shard = BatchSamplerShard(plain.batch_sampler, processes, process)
        loader = DataLoader(
            range(size), batch_sampler=shard, collate_fn=identity, num_workers=workers
        )
        rows = np.array(list(loader))
        assert rows.shape == (num_batches * accumulation, micro)
        shards.append(rows.reshape(num_batches, accumulation, micro))
    # (steps, accumulation, processes, micro): the order in which the sampler gave the rows.
    together = np.stack(shards, axis=2).reshape(num_batches, batch_size)
    np.testing.assert_array_equal(together, expected)


def make_parts(draw: st.DrawFn) -> list[OrderedPart]:
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 60))
        weight = draw(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]))
        per_shard = draw(st.none() | st.integers(1, 7))
        shards = None if per_shard is None else np.arange(size) // per_shard
        parts.append(OrderedPart(size, weight, shards))
    return parts


mixtures = st.composite(make_parts)()


def mixed(parts: list[OrderedPart], batch_size: int, num_batches: int, seed: int = 0):
    size = sum(part.size for part in parts)
    return LengthBucketedSampler(lengths_of(size), batch_size, num_batches, seed, parts)


class TestMixtures:
    @given(parts=mixtures, seed=seeds)
    @thorough
    def test_each_epoch_holds_the_weighted_share_of_each_source(
        self, parts: list[OrderedPart], seed: int
    ) -> None:
        epochs = 4
        shares = [max(1, round(part.weight * part.size)) for part in parts]
        sampler = mixed(parts, sum(shares), epochs, seed)  # a batch is an epoch
        owner = np.repeat(np.arange(len(parts)), [part.size for part in parts])
        seen = np.zeros(len(owner), dtype=int)
        for batch in sampler.batches():
            assert np.bincount(owner[batch], minlength=len(parts)).tolist() == shares
            seen += np.bincount(batch, minlength=len(owner))
        for source, share in enumerate(shares):
            # Fractions rotate: nothing is seen again before everything has been seen.
            counts = seen[owner == source]
            assert counts.sum() == epochs * share
            assert counts.max() - counts.min() <= 1

    @given(parts=mixtures, batch_size=batch_sizes, start=st.integers(0, 70), seed=seeds)
    @settings(deadline=None, derandomize=True, max_examples=20)
    def test_going_on_anywhere_gives_the_rest(
        self, parts: list[OrderedPart], batch_size: int, start: int, seed: int
    ) -> None:
        whole = [batch.tolist() for batch in mixed(parts, batch_size, 60, seed).batches()]
        assert len(whole) == 60
        rest = [batch.tolist() for batch in mixed(parts, batch_size, 60, seed).batches(start)]
        assert rest == whole[start:]
        longer = [batch.tolist() for batch in mixed(parts, batch_size, 90, seed).batches()]
        assert longer[:60] == whole

    def test_sources_are_mixed_all_along(self) -> None:
        parts = [OrderedPart(300), OrderedPart(100, 3.0), OrderedPart(600, 0.5)]
        sampler = mixed(parts, 90, 10)
        share = np.array([np.mean(batch < 300) for batch in sampler.batches()])
        assert abs(share - 1 / 3).max() < 0.2

    def test_equal_sources_have_orders_of_their_own(self) -> None:
        sampler = mixed([OrderedPart(50), OrderedPart(50)], 100, 1)
        first, second = (sampler._pass(source, 0).tolist() for source in (0, 1))
        assert first != second

    def test_lengths_have_to_fit(self) -> None:
        with pytest.raises(ValueError, match="5 samples in the parts but 6 lengths"):
            LengthBucketedSampler(lengths_of(6), 2, 2, 0, [OrderedPart(5)])


class TestShards:
    def epoch(self, shards: int, per_shard: int, epoch: int = 0, seed: int = 0) -> np.ndarray:
        part = OrderedPart(shards * per_shard, shards=np.arange(shards * per_shard) // per_shard)
        return mixed([part], 1, 1, seed)._epoch(epoch)

    def test_few_shards_are_read_at_a_time(self) -> None:
        per_shard = 20
        shards = self.epoch(40, per_shard) // per_shard
        window = WINDOW_SHARDS * per_shard
        for start in range(0, len(shards), window):
            assert len(np.unique(shards[start : start + window])) == WINDOW_SHARDS
        ends = [np.flatnonzero(shards == shard).max() for shard in range(40)]
        starts = [np.flatnonzero(shards == shard).min() for shard in range(40)]
        assert (np.array(ends) - starts < window).all()

    def test_samples_of_a_window_are_shuffled(self) -> None:
        rows = self.epoch(WINDOW_SHARDS, 50)
        assert sorted(rows) == list(range(WINDOW_SHARDS * 50))
        assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.2

    def test_every_epoch_and_seed_has_another_order_of_shards(self) -> None:
        orders = {
            tuple(self.epoch(40, 5, epoch, seed)[::40] // 5) for epoch in (0, 1) for seed in (0, 1)
        }
        assert len(orders) == 4

    def test_numbers_of_shards_may_have_gaps(self) -> None:
        part = OrderedPart(30, shards=np.repeat([3, 17, 400], 10))
        assert sorted(mixed([part], 1, 1)._epoch(0)) == list(range(30))

    def test_batches_are_bucketed_all_the_same(self) -> None:
        part = OrderedPart(4000, shards=np.arange(4000) // 100)
        sampler = mixed([part], 32, 125)
        assert padding(sampler.lengths, np.array(list(sampler.batches()))) < 0.08


def make_grouped_parts(draw: st.DrawFn) -> list[OrderedPart]:
    """Of images with one to six captions each; their numbers may have gaps."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=25))
        images = 3 * np.arange(len(counts)) + draw(st.integers(0, 5))
        groups = np.repeat(images, counts)
        per_shard = draw(st.none() | st.integers(3, 20))
        shards = None if per_shard is None else groups // per_shard
        weight = draw(st.sampled_from([0.5, 1.0, 2.0]))
        parts.append(OrderedPart(len(groups), weight, shards, groups))
    return parts


grouped_mixtures = st.composite(make_grouped_parts)()


def image_of_row(parts: list[OrderedPart]) -> np.ndarray:
    """Images of different parts are different ones."""
    return np.concatenate([1000 * n + part.groups for n, part in enumerate(parts)])


class TestGroups:
    @given(parts=grouped_mixtures, batch_size=batch_sizes, seed=seeds)
    @thorough
    def test_a_pass_holds_each_sample_once_and_siblings_side_by_side(
        self, parts: list[OrderedPart], batch_size: int, seed: int
    ) -> None:
        sampler = mixed(parts, batch_size, 1, seed)
        for source, part in enumerate(parts):
            for number in (0, 1):
                rows = sampler._pass(source, number)
                assert sorted(rows) == list(range(part.size))
                runs = 1 + np.count_nonzero(np.diff(part.groups[rows]))
                assert runs == len(np.unique(part.groups))

    @given(parts=grouped_mixtures, batch_size=batch_sizes, seed=seeds)
    @thorough
    def test_a_batch_has_the_captions_of_an_image_side_by_side(
        self, parts: list[OrderedPart], batch_size: int, seed: int
    ) -> None:
        images = image_of_row(parts)
        for batch in mixed(parts, batch_size, 40, seed).batches():
            assert batch.shape == (batch_size,)
            assert 1 + np.count_nonzero(np.diff(images[batch])) == len(np.unique(images[batch]))

    @given(parts=grouped_mixtures, batch_size=batch_sizes, start=st.integers(0, 50), seed=seeds)
    @settings(deadline=None, derandomize=True, max_examples=20)
    def test_epochs_are_complete_and_going_on_anywhere_gives_the_rest(
        self, parts: list[OrderedPart], batch_size: int, start: int, seed: int
    ) -> None:
        shares = [max(1, round(part.weight * part.size)) for part in parts]
        owner = np.repeat(np.arange(len(parts)), [part.size for part in parts])
        for batch in mixed(parts, sum(shares), 3, seed).batches():  # a batch is an epoch
            assert np.bincount(owner[batch], minlength=len(parts)).tolist() == shares
        whole = [batch.tolist() for batch in mixed(parts, batch_size, 50, seed).batches()]
        rest = [batch.tolist() for batch in mixed(parts, batch_size, 50, seed).batches(start)]
        assert rest == whole[start:]

    def coco(self, images: int = 2000) -> OrderedPart:
        return OrderedPart(5 * images, groups=np.arange(5 * images) // 5)

    def test_hardly_an_image_is_in_two_batches(self) -> None:
        sampler = mixed([self.coco()], 64, 156)
        batches = np.array(list(sampler.batches())) // 5
        assert np.mean([len(np.unique(batch)) for batch in batches]) < 64 / 5 + 1

    def test_captions_of_similar_length_come_together_all_the_same(self) -> None:
        images = 2000
        usual = np.random.default_rng(1).normal(12, 5, images).clip(6, 60).repeat(5)
        lengths = np.random.default_rng(2).normal(usual, 1.5).clip(3, 77).astype(int)
        sampler = LengthBucketedSampler(lengths, 40, 250, 0, [self.coco(images)])
        batches = np.array(list(sampler.batches()))
        assert padding(lengths, batches) < 0.5 * padding(
            lengths, np.random.default_rng(0).permutation(batches.ravel()).reshape(batches.shape)
        )

    def test_images_and_their_captions_are_shuffled(self) -> None:
        part = self.coco()
        sampler = LengthBucketedSampler(np.full(10000, 9), 50, 400, 0, [part])
        first, second = np.split(np.array(list(sampler.batches())), 2)
        assert sorted(first.ravel()) == sorted(second.ravel())
        neighbours = [{frozenset(batch // 5) for batch in epoch} for epoch in (first, second)]
        assert not neighbours[0] & neighbours[1]
        # Of equal length, so nothing but chance says which images come together, ...
        assert abs(np.corrcoef(first.ravel() // 5, np.arange(10000))[0, 1]) < 0.1
        for batch in first:
            assert np.ptp(batch // 5) > 500
        # ... and in which order their captions do.
        assert np.mean(np.diff(first.ravel() % 5) == 1) < 0.5

    def test_one_caption_for_each_image_is_one_permutation_more(self) -> None:
        part = OrderedPart(300, groups=np.arange(300))
        batches = np.array(list(mixed([part], 10, 30).batches()))
        assert sorted(batches.ravel()) == list(range(300))


def test_epochs_are_permuted_once() -> None:
    # Three million captions must not be permuted anew for every 32 batches.
    drawn = []

    class Counting(LengthBucketedSampler):
        def _pass(self, source: int, number: int) -> np.ndarray:
            drawn.append((source, number))
            return super()._pass(source, number)

    parts = [OrderedPart(700), OrderedPart(600)]
    list(Counting(lengths_of(1300), 4, 1300 * 3 // 4, 0, parts).batches())
    assert sorted(drawn) == [(source, number) for source in (0, 1) for number in range(3)]
