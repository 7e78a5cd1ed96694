"""With one process; with several see tests/distributed/test_several_processes.py."""

import pytest

from hive_vision.training.processes import (
    gather_lists,
    max_over_processes,
    on_main,
    start_processes,
    sum_over_processes,
)


def fail():
    raise ValueError("as it is")


def test_one_process_agrees_with_itself():
    assert start_processes().num_processes == 1
    assert on_main(lambda: 3) == 3
    assert gather_lists([1, 2]) == [1, 2]
    assert sum_over_processes(2.5) == max_over_processes(2.5) == 2.5


def test_errors_come_through():
    with pytest.raises(ValueError, match="as it is"):
        on_main(fail)
