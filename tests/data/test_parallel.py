"""Work in several processes: the same results, one line for an error, no orphans."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.data.parallel import processors, row_ranges, work_through

SLEEPER = """
import os, time
from hive_vision.data.parallel import processors, row_ranges, work_through

def work(rows):
    print(os.getpid(), flush=True)
    time.sleep(600)

list(work_through(work, row_ranges(4, 1), 2, "sleeping"))
"""


def square(rows: range) -> list[int]:
    return [row * row for row in rows]


def fail_at_five(rows: range) -> None:
    if 5 in rows:
        raise OSError(28, "No space left on device")


def tell_process(rows: range) -> int:
    return os.getpid()


@given(st.integers(0, 200), st.integers(1, 50))
def test_ranges_hold_every_row_once(count: int, size: int) -> None:
    ranges = row_ranges(count, size)
    assert [row for rows in ranges for row in rows] == list(range(count))
    assert all(len(rows) == size for rows in ranges[:-1])
    assert all(0 < len(rows) <= size for rows in ranges[-1:])


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    state = torch.get_rng_state()
    ranges = row_ranges(23, 4)
    assert list(work_through(square, ranges, workers, "squares")) == [square(r) for r in ranges]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


def test_several_processes_work() -> None:
    assert set(work_through(tell_process, row_ranges(3, 1), 1, "here")) == {os.getpid()}
    found = set(work_through(tell_process, row_ranges(8, 1), 2, "there"))
    assert len(found) == 2
    assert os.getpid() not in found


def test_nothing_to_do() -> None:
    assert list(work_through(square, [], 2, "nothing")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_arrive_as_they_were_raised(workers: int) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        list(work_through(fail_at_five, row_ranges(8, 2), workers, "failing"))
    assert len(str(raised.value).splitlines()) == 1


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hive_vision")
    list(work_through(square, row_ranges(1000, 7), 1, "squares"))
    assert caplog.records == []


def test_lines_without_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_vision.data.parallel.QUIET_SECONDS", -1)
    caplog.set_level(logging.INFO, "hive_vision")
    list(work_through(square, row_ranges(1000, 7), 1, "squares"))
    lines = [record.getMessage() for record in caplog.records]
    assert 5 <= len(lines) <= 10
    assert lines[-1].startswith("squares  1000/1000 images")
    assert all("ETA 0:" in line for line in lines)


def test_workers_end_with_the_process_that_started_them() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        workers = [int(run.stdout.readline()) for _ in range(2)]
        run.kill()
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker goes on without its parent"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        os.kill(process, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_more_workers_than_processors_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    many = processors() + 1
    assert len(list(work_through(square, row_ranges(many, 1), many, "squares"))) == many
    assert [str(warning.message) for warning in recwarn] == []
