"""The order of the data: complete, seeded, bucketed, and the same on any machine."""

from itertools import islice

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hive_vision.data.sampler import LengthBucketedSampler

thorough = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.integers(1, 150)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31 - 1)


def lengths_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 78, size)


def global_batches(size: int, batch_size: int, num_batches: int, seed: int = 0) -> np.ndarray:
    sampler = LengthBucketedSampler(lengths_of(size), batch_size, num_batches, seed)
    return np.array(list(sampler.batches()))


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
