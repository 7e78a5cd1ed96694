"""What happens to samples that cannot be used: others take their place, and it is reported."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset

MAX_REPLACEMENTS = 100

T = TypeVar("T")


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and what was taken instead.

    Attributes:
        sample_id: Its number in the training part of the data.
        source: The image file, or the row where images are embedded.
        reason: Why.
        replaced_by: Number of the sample that was used instead.
    """

    sample_id: int
    source: str
    reason: str
    replaced_by: int


class UnusableSampleError(Exception):
    """A sample that cannot be used.

    Args:
        sample_id: Its number in the training part of the data.
        source: The image file, or the row where images are embedded.
        reason: Why; one line.
    """

    def __init__(self, sample_id: int, source: str, reason: str) -> None:
        super().__init__(reason)
        self.sample_id = sample_id
        self.source = source
        self.reason = reason

    def replaced_by(self, sample_id: int) -> BadSample:
        """Say what took its place."""
        return BadSample(self.sample_id, self.source, self.reason, sample_id)


class ReplacingDataset(Dataset[T], Generic[T]):
    """Samples, bad ones replaced.

    A bad sample is replaced by one that depends only on the bad one's row, so it is the same on
    every worker and rank, and it is reported with the sample.
    """

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, row: int, bad: list[UnusableSampleError]) -> T:
        """Read a sample that takes the place of those that could not be used.

        Raises:
            UnusableSampleError: If it cannot be used either.
        """

    def __getitem__(self, index: int) -> T:
        """Read sample ``index``, or its replacement.

        Raises:
            ValueError: If not even one of 100 replacements can be used.
        """
        row = int(index)
        try:
            return self.read(row, [])
        except UnusableSampleError as error:
            bad = [error]
        replacements = np.random.default_rng(row)
        for _ in range(MAX_REPLACEMENTS - 1):
            try:
                return self.read(int(replacements.integers(len(self))), bad)
            except UnusableSampleError as error:
                bad.append(error)
        raise ValueError(
            f"sample {index} and {MAX_REPLACEMENTS - 1} replacements cannot be used; the last "
            f"one: {bad[-1].reason}"
        )
