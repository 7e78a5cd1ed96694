"""What every command that trains does around the training: processes, interruptions, one line."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_training(output: str, train: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Train in this process, which may be one of several.

    Args:
        output: The run folder.
        train: Does it.

    Returns:
        The results, on the main process only.
    """
    from hive_vision.training.errors import InterruptedRunError
    from hive_vision.training.processes import leave_processes, start_processes
    from hive_vision.training.watchdog import main_said

    main = start_processes().is_main_process
    if not main:
        logging.getLogger("hive_vision").setLevel(logging.ERROR)
    try:
        results = train()
    except InterruptedRunError as interruption:
        if main:
            sys.stderr.write(f"{interruption}; run the same command again to go on\n")
        sys.exit(128 + interruption.signal_number)
    except (ValueError, RuntimeError, OSError) as error:
        # A launcher ends the others when one process died: not before the line is written.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not main and main_said(Path(output), str(error)):
            sys.exit(1)
        raise
    leave_processes()
    return results if main else None
