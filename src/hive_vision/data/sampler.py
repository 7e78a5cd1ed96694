"""The order in which samples are seen: the same global batches on any number of machines."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

POOL_BATCHES = 32


class LengthBucketedSampler(Sampler[int]):
    """An endless, seeded order cut into global batches of captions of similar length.

    The stream is one permutation of the data after another. Pools of at most 32 batches, which
    end where an epoch ends, are sorted by length and cut into batches, whose order is shuffled:
    on captions this removes nearly all padding. Global batch k depends on lengths, batch size
    and seed only, so a resumed or longer run, another number of processes or another
    micro-batch sees the same batches.

    Args:
        lengths: Tokens of each sample.
        batch_size: Global batch size B.
        num_batches: How many batches to give.
        seed: Of the order.
    """

    def __init__(
        self, lengths: NDArray[np.int64], batch_size: int, num_batches: int, seed: int
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            yield from batch.tolist()

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Give the global batches, each (B,) rows of the data, shortest captions first."""
        first = 0
        while first < self.num_batches:
            epoch = first * self.batch_size // len(self.lengths)
            epoch_end = -(-(epoch + 1) * len(self.lengths) // self.batch_size)
            count = min(POOL_BATCHES, epoch_end - first)
            rows = self._stream(first * self.batch_size, count * self.batch_size)
            ordered = rows[np.argsort(self.lengths[rows], kind="stable")]
            shuffled = np.random.default_rng([self.seed, 1, first]).permutation(count)
            batches = ordered.reshape(count, self.batch_size)[shuffled]
            yield from batches[: self.num_batches - first]
            first += count

    def _stream(self, start: int, count: int) -> NDArray[np.int64]:
        """Positions ``start`` to ``start + count`` of the concatenated epochs."""
        size = len(self.lengths)
        parts = [
            np.random.default_rng([self.seed, 0, epoch]).permutation(size)
            for epoch in range(start // size, -(-(start + count) // size))
        ]
        offset = start % size
        return np.concatenate(parts)[offset : offset + count]
