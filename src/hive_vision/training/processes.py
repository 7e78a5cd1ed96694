"""What several processes have to agree on. With one process each of these is a plain call."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hive_vision.training.errors import InterruptedRunError

T = TypeVar("T")

_LAUNCHER = frozenset(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
        *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
)

# Building the miniature or tokenizing millions of captions happens on one process while the
# others wait. Dead and stalled ranks are found by the watchdog, not by this limit.
LONGEST_WAIT = timedelta(hours=3)


def start_processes() -> PartialState:
    """Join the other processes of ``torchrun`` or ``accelerate launch``, if there are any."""
    if PartialState._shared_state:
        return PartialState()
    # Without saying so, accelerate starts several independent runs where there is no accelerator.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)


def leave_processes() -> None:
    """Part from the other processes, before one ends under a thread that waits for another."""
    PartialState().destroy_process_group()


def on_main(function: Callable[[], T]) -> T:
    """Run a function on the main process only; its result, or its error, reaches all of them.

    The main process does not wait for the others before it begins.

    Args:
        function: What to do, e.g. writing into the run folder.

    Raises:
        Exception: What the function raised, on every process.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except (Exception, InterruptedRunError) as error:  # noqa: BLE001  raised on all of them
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def on_main_apart(function: Callable[[Any], T], argument: Any) -> T:
    """Run what starts a Trainer of its own on the main process only.

    With several processes it runs in one beside them, which knows nothing of the others: its
    collective operations would meet theirs.
    """
    if PartialState().num_processes == 1:
        return function(argument)

    def apart() -> T:
        context = get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=_forget_launcher) as pool:
            return pool.submit(function, argument).result()

    return on_main(apart)


def _forget_launcher() -> None:
    for name in list(os.environ):
        if name in _LAUNCHER or name.startswith(("TORCHELASTIC_", "ACCELERATE_", "FSDP_")):
            del os.environ[name]


def gather_lists(items: list[T]) -> list[T]:
    """Concatenate the lists of all processes, in the order of their ranks."""
    if PartialState().num_processes == 1:
        return items
    gathered: list[T] = gather_object(items)
    return gathered


def sum_over_processes(value: float) -> float:
    """Add up a number over all processes."""
    return _reduce(value, torch.distributed.ReduceOp.SUM)


def max_over_processes(value: float) -> float:
    """Find the largest of all processes' numbers."""
    return _reduce(value, torch.distributed.ReduceOp.MAX)


def _reduce(value: float, operation: Any) -> float:
    state = PartialState()
    if state.num_processes == 1:
        return value
    # Of float32's precision on devices without float64, which counts and losses do not need.
    total = torch.tensor(value, dtype=torch.float32, device=state.device)
    torch.distributed.all_reduce(total, operation)
    return float(total)
