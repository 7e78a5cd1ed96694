"""Ends a run that hangs: a stalled loader, a stalled step, or another process that died.

A process that waits inside a collective operation cannot help itself, so a thread looks after
it. Processes on several machines see each other through the run folder, which they share.
"""

import faulthandler
import logging
import math
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from hive_vision.folders import read_json, write_json
from hive_vision.training.processes import on_main

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between looks
SIGNS = ".ranks"  # folder inside the run folder
SILENT = 45.0  # seconds without a sign of life after which another machine's process is dead


class Watchdog:
    """Watches this process's progress and the other processes' lives, as a context manager.

    Args:
        folder: The run folder.
        rank: This process.
        ranks: How many there are.
        stall_seconds: Longest time between two ``progress`` calls, from the first one on; 0 watches
            only the others.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, stall_seconds: float) -> None:
        self.folder = folder
        self.rank = rank
        self.ranks = ranks
        self.stall_seconds = stall_seconds
        self._doing = ""
        # Not yet: making the token ids of millions of captions takes as long as it takes.
        self._since = math.inf
        self._heard: dict[int, tuple[float, float]] = {}  # last change of a sign, and when seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.ranks > 1:
            on_main(self._forget_earlier_starts)
            self._sign_of_life()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.ranks == 1:
            return
        if error is None:
            self._sign_of_life(left="finished")
            return
        self._sign_of_life(left=str(error) or type(error).__name__)

    def progress(self, doing: str) -> None:
        """Note that the run moves.

        Args:
            doing: What begins now, for the message about a stall.
        """
        self._doing, self._since = doing, time.monotonic()

    def pause(self, doing: str) -> None:
        """Note that something begins which may take as long as it takes, until more progress.

        Args:
            doing: What begins now.
        """
        self._doing, self._since = doing, math.inf

    def lost_process(self, patience: float = 0.0) -> str | None:
        """Name a process that died or failed.

        Args:
            patience: Seconds to wait for a sign of it.

        Returns:
            One line, or ``None`` if all are well.
        """
        deadline = time.monotonic() + patience
        while self.ranks > 1:
            for rank in range(self.ranks):
                lost = None if rank == self.rank else self._lost(rank)
                if lost is not None:
                    return f"rank {rank} of {self.ranks} {lost}"
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        return None

    @property
    def _signs(self) -> Path:
        return self.folder / SIGNS

    def _forget_earlier_starts(self) -> None:
        shutil.rmtree(self._signs, ignore_errors=True)
        self._signs.mkdir(parents=True)

    def _sign_of_life(self, left: str | None = None) -> None:
        sign = {"host": socket.gethostname(), "pid": os.getpid(), "left": left}
        write_json(self._signs / str(self.rank), sign)

    def _lost(self, rank: int) -> str | None:
        path = self._signs / str(rank)
        sign = read_json(path)
        modified = path.stat().st_mtime if sign else 0.0
        # Clocks of machines differ: what counts is when a change was seen here.
        if self._heard.get(rank, (None, 0.0))[0] != modified:
            self._heard[rank] = (modified, time.monotonic())
        silence = time.monotonic() - self._heard[rank][1]
        if sign is None:
            return "never started" if silence > SILENT else None
        where = f"(process {sign['pid']} on {sign['host']})"
        if sign["left"] == "finished":
            return None
        if sign["left"] is not None:
            return f"{where} stopped: {sign['left']}"
        if sign["host"] == socket.gethostname() and not _is_alive(sign["pid"]):
            return f"{where} died"
        return f"{where} gave no sign of life for {silence:.0f} s" if silence > SILENT else None

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            if self.ranks > 1:
                try:
                    os.utime(self._signs / str(self.rank))
                    lost = self.lost_process()
                except OSError:  # a shared disk that does not answer for a moment
                    lost = None
                # Whoever notices by itself writes a better line: give it a moment.
                if lost is not None and not self._stop.wait(5 * INTERVAL):
                    self._end(f"{lost}; run the same command again to go on")
            stalled = time.monotonic() - self._since
            if self.stall_seconds and stalled > self.stall_seconds:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"stalled-rank{self.rank}.txt"
                with path.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                self._end(
                    f"rank {self.rank} has been {self._doing} for {stalled:.0f} s "
                    f"(faults.stall_seconds); every thread's stack is in {path}; "
                    "run the same command again to go on from the last checkpoint"
                )

    def _end(self, line: str) -> None:
        """End the process from its thread: the main thread may never come back."""
        if self.ranks > 1:
            self._sign_of_life(left=line)
        sys.stderr.write(f"hive-vision: {line}\n")
        sys.stderr.flush()
        os._exit(1)


def main_said(folder: Path, line: str, patience: float = 3.0) -> bool:
    """Whether the main process of a run ended with the same line, so that once is enough."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        sign = read_json(folder / SIGNS / "0")
        if sign is not None and sign["left"] is not None:
            return bool(sign["left"] == line)
        time.sleep(0.1)
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process ended but its parent has not asked yet (it still has a number)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "Z"
