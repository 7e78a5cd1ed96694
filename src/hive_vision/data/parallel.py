"""Long work over many images: in several processes, with progress and an ETA."""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

T = TypeVar("T")
REPORTS = 10  # progress lines when there is no terminal
QUIET_SECONDS = 5.0  # work that is done by then says nothing
WATCH_SECONDS = 0.2


def processors() -> int:
    """Give how many processors this process may use."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))  # what a job was given of the machine


def row_ranges(count: int, size: int) -> list[range]:
    """Cut ``count`` rows into ranges of ``size``; the last one may be shorter."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def work_through(
    work: Callable[[range], T],
    ranges: Sequence[range],
    workers: int,
    title: str,
    unit: str = "images",
) -> Iterator[T]:
    """Do ``work`` on every range of rows, in their order.

    Args:
        work: Gives one result for a range. It runs in another process, so it must pickle.
        ranges: Rows.
        workers: Processes; with one there is no other than this.
        title: What is shown beside the progress.
        unit: What the rows are.

    Yields:
        The results, in the order of the ranges.

    Raises:
        ValueError: Whatever ``work`` raises, as it was raised there.
    """
    with warnings.catch_warnings():
        # More processes than processors can be right: they wait for the disk.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            _Work(work, ranges),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=0 if workers == 1 else min(workers, len(ranges)),
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # the global one stays as it is
        )
        results = iter(loader)
    try:
        with _progress(title, unit, sum(map(len, ranges))) as advance:
            for rows, result in zip(ranges, results, strict=True):
                if isinstance(result, Exception):
                    raise result
                advance(len(rows))
                yield result
    finally:
        # An error's traceback would keep the workers, and their late end takes seconds each.
        del results


class _Work(Dataset[Any], Generic[T]):
    """Ranges of rows as the samples of a DataLoader, which brings processes that are watched."""

    def __init__(self, work: Callable[[range], T], ranges: Sequence[range]) -> None:
        self.work = work
        self.ranges = ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> T | Exception:
        try:
            return self.work(self.ranges[index])
        except (ValueError, RuntimeError, OSError) as error:
            return error  # raised there, it would come with a traceback inside its text


def _as_it_is(result: T) -> T:
    return result


def _end_with_parent(worker: int) -> None:
    """End this process when the one that started it is gone, even by kill -9."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _progress(title: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, some log lines elsewhere; gives what moves it on."""
    console = Console(stderr=True)
    if not (console.is_terminal and logger.isEnabledFor(logging.INFO)):
        yield _Lines(title, unit, total).advance
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """A log line after each tenth of the work."""

    def __init__(self, title: str, unit: str, total: int) -> None:
        self.title, self.unit, self.total = title, unit, total
        self.done = self.reported = 0
        self.started = time.monotonic()

    def advance(self, count: int) -> None:
        """Count; say so if it is time to."""
        self.done += count
        tenth = self.done * REPORTS // self.total
        elapsed = time.monotonic() - self.started
        if tenth > self.reported and elapsed > QUIET_SECONDS:
            self.reported = tenth
            rate = self.done / elapsed
            remaining = timedelta(seconds=round((self.total - self.done) / rate))
            logger.info(
                "%s  %d/%d %s  %.0f/s  ETA %s",
                *(self.title, self.done, self.total, self.unit, rate, remaining),
            )
