"""The order in which samples are seen: the same global batches on any number of machines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

POOL_BATCHES = 32
WINDOW_SHARDS = 8  # samples of so many shards are mixed with each other


@dataclass(frozen=True, eq=False)
class OrderedPart:
    """One source of a mixture, as far as the order needs to know it.

    Args:
        size: Samples n; those of the first part are rows 0 to n - 1, then comes the next part.
        weight: Passes over it in each epoch.
        shards: (n,) shard of each sample, if whole shards should be read one after another.
        groups: (n,) image of each sample, if those of an image should stay together.
    """

    size: int
    weight: float = 1.0
    shards: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    @property
    def per_epoch(self) -> int:
        """How many of its samples an epoch holds."""
        return max(1, round(self.weight * self.size))


class LengthBucketedSampler(Sampler[int]):
    """An endless, seeded order cut into global batches of captions of similar length.

    The stream is one epoch after another; an epoch of a single source is a permutation of it.
    Pools of at most 32 batches, which end where an epoch ends, are sorted by length and cut into
    batches, whose order is shuffled: on captions this removes nearly all padding. Global batch k
    depends on the data, batch size and seed only, so a resumed or longer run, another number of
    processes or another micro-batch sees the same batches.

    In a mixture each source goes on through passes of its own: an epoch takes the next
    ``weight * n`` samples of it, and their places among those of other sources are drawn. Sources
    in shards are not permuted as a whole: shards are, and samples inside windows of 8 shards.

    With groups it is images that are permuted, and pools are sorted by the longest caption that an
    image has there: the captions of an image are neighbours but where a batch, pool or epoch ends.

    Args:
        lengths: Tokens of each sample.
        batch_size: Global batch size B.
        num_batches: How many batches to give.
        seed: Of the order.
        parts: The sources that the samples come from; a single one if not given.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        batch_size: int,
        num_batches: int,
        seed: int,
        parts: Sequence[OrderedPart] | None = None,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.parts = [OrderedPart(len(lengths))] if parts is None else list(parts)
        sizes = [part.size for part in self.parts]
        if sum(sizes) != len(lengths):
            raise ValueError(f"{sum(sizes)} samples in the parts but {len(lengths)} lengths")
        self._first_rows = np.cumsum([0, *sizes])
        self._groups = _number_groups(self.parts)
        self.epoch_size = sum(part.per_epoch for part in self.parts)
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            yield from batch.tolist()

    def batches(self, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """Give the global batches, each (B,) rows of the data, shortest captions (or groups) first.

        Args:
            start: The first one to give; those before it cost nothing.
        """
        first = 0
        while first < self.num_batches:
            epoch = first * self.batch_size // self.epoch_size
            epoch_end = -(-(epoch + 1) * self.epoch_size // self.batch_size)
            count = min(POOL_BATCHES, epoch_end - first)
            if start < first + count:
                pool = self._pool(first, count)
                yield from pool[max(0, start - first) : self.num_batches - first]
            first += count

    def _pool(self, first: int, count: int) -> NDArray[np.int64]:
        """Batches ``first`` to ``first + count``, bucketed by length: (count, B)."""
        rows = self._stream(first * self.batch_size, count * self.batch_size)
        groups = np.arange(len(rows)) if self._groups is None else self._groups[rows]
        _, first_places, group = np.unique(groups, return_index=True, return_inverse=True)
        longest = np.zeros(len(first_places), dtype=np.int64)
        np.maximum.at(longest, group, self.lengths[rows])
        ordered = rows[np.lexsort((first_places[group], longest[group]))]
        shuffled = np.random.default_rng([self.seed, 1, first]).permutation(count)
        batches: NDArray[np.int64] = ordered.reshape(count, self.batch_size)[shuffled]
        return batches

    def _stream(self, start: int, count: int) -> NDArray[np.int64]:
        """Positions ``start`` to ``start + count`` of the concatenated epochs."""
        size = self.epoch_size
        epochs = range(start // size, -(-(start + count) // size))
        # Permutations of millions are not drawn again for each pool.
        kept = {epoch: rows for epoch, rows in self._epochs.items() if epoch in epochs}
        self._epochs = kept | {epoch: self._epoch(epoch) for epoch in epochs if epoch not in kept}
        inside = [(max(0, start - e * size), min(size, start + count - e * size)) for e in epochs]
        pieces = zip(epochs, inside, strict=True)
        return np.concatenate([self._epochs[e][first:last] for e, (first, last) in pieces])

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """All rows of an epoch in their order."""
        if len(self.parts) == 1:
            return self._next_of(0, epoch * self.epoch_size, self.epoch_size)
        counts = [part.per_epoch for part in self.parts]
        which = np.repeat(np.arange(len(counts)), counts)
        which = np.random.default_rng([self.seed, 2, epoch]).permutation(which)
        rows = np.empty(self.epoch_size, dtype=np.int64)
        for source, count in enumerate(counts):
            rows[which == source] = self._next_of(source, epoch * count, count)
        return rows

    def _next_of(self, source: int, start: int, count: int) -> NDArray[np.int64]:
        """Positions ``start`` to ``start + count`` of the concatenated passes over a source."""
        size = self.parts[source].size
        passes = range(start // size, -(-(start + count) // size))
        rows = np.concatenate([self._pass(source, number) for number in passes])
        offset = start % size
        chosen: NDArray[np.int64] = self._first_rows[source] + rows[offset : offset + count]
        return chosen

    def _pass(self, source: int, number: int) -> NDArray[np.int64]:
        """One seeded order of a source's samples, each once."""
        part = self.parts[source]
        # The first source's seed has no fourth number.
        random = np.random.default_rng([self.seed, 0, number, *([source] if source else [])])
        order: NDArray[np.int64] = random.permutation(part.size)
        if part.groups is not None:
            rank = random.permutation(part.groups.max() + 1)
            order = order[np.argsort(rank[part.groups[order]], kind="stable")]
        if part.shards is None:
            return order
        shards = np.unique(part.shards)
        place = np.empty(shards.max() + 1, dtype=np.int64)
        place[shards] = random.permutation(len(shards))
        windows = place[part.shards] // WINDOW_SHARDS
        by_window: NDArray[np.int64] = order[np.argsort(windows[order], kind="stable")]
        return by_window


def _number_groups(parts: Sequence[OrderedPart]) -> NDArray[np.int64] | None:
    """Group of each row, those of different parts told apart; ``None`` if no part has any."""
    if all(part.groups is None for part in parts):
        return None
    numbers, first = [], 0
    for part in parts:
        groups = np.arange(part.size) if part.groups is None else part.groups
        numbers.append(first + groups)
        first += int(groups.max(initial=-1)) + 1
    return np.concatenate(numbers)
