import json
import os
import subprocess
import sys
import textwrap

import pytest

from hive_vision.training.watchdog import SIGNS, Watchdog, main_said


def watch(tmp_path, code, **options):
    """Run a few lines in a process that a watchdog looks after."""
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from hive_vision.training.watchdog import Watchdog
        def stuck_loader():
            time.sleep(60)
        with Watchdog(Path({str(tmp_path)!r}), 0, 1, stall_seconds=1.5) as watchdog:
        """
    ) + textwrap.indent(textwrap.dedent(code), "    ")
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)


def test_stall_ends_the_run_with_every_stack(tmp_path):
    ended = watch(tmp_path, 'watchdog.progress("waiting for data")\nstuck_loader()')
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("hive-vision: rank 0 has been waiting for data for ")
    assert "faults.stall_seconds" in line
    assert "in stuck_loader" in (tmp_path / "stalled-rank0.txt").read_text()


def test_progress_keeps_a_slow_run_alive(tmp_path):
    code = "for step in range(5):\n    watchdog.progress('step')\n    time.sleep(0.6)"
    assert watch(tmp_path, code).returncode == 0
    assert not list(tmp_path.iterdir())


def test_what_takes_as_long_as_it_takes_is_no_stall(tmp_path):
    code = "watchdog.progress('step')\nwatchdog.pause('probing')\ntime.sleep(3.5)"
    assert watch(tmp_path, code).returncode == 0
    again = watch(tmp_path, f"{code}\nwatchdog.progress('step')\nstuck_loader()")
    assert "has been step for" in again.stderr


@pytest.fixture
def of_two(tmp_path):
    """The watchdog of rank 0, its thread not started, and a way to write rank 1's sign."""
    (tmp_path / SIGNS).mkdir()
    watchdog = Watchdog(tmp_path, 0, 2, stall_seconds=0)

    def sign(**content):
        defaults = {"host": os.uname().nodename, "pid": os.getpid(), "left": None}
        (tmp_path / SIGNS / "1").write_text(json.dumps({**defaults, **content}))

    return watchdog, sign


def test_living_and_finished_ranks_are_well(of_two):
    watchdog, sign = of_two
    assert watchdog.lost_process() is None, "not started yet"
    sign()
    assert watchdog.lost_process() is None
    sign(left="finished", pid=2**22 + 1)
    assert watchdog.lost_process() is None


def test_dead_rank_is_named(of_two):
    watchdog, sign = of_two
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    sign(pid=process.pid)
    assert watchdog.lost_process().startswith(f"rank 1 of 2 (process {process.pid} on ")
    assert watchdog.lost_process().endswith("died")


def test_rank_that_failed_says_why(of_two):
    watchdog, sign = of_two
    sign(left="no space left")
    assert watchdog.lost_process().endswith("stopped: no space left")


def test_silent_rank_on_another_machine_is_lost(of_two, monkeypatch):
    watchdog, sign = of_two
    sign(host="elsewhere")
    assert watchdog.lost_process() is None
    heard = watchdog._heard[1]
    watchdog._heard[1] = (heard[0], heard[1] - 60)
    assert "gave no sign of life for 60 s" in watchdog.lost_process()
    os.utime(watchdog.folder / SIGNS / "1", (1, 1))
    assert watchdog.lost_process() is None, "whatever its clock says, it was touched"


def test_one_process_has_no_others(tmp_path):
    with Watchdog(tmp_path / "run", 0, 1, stall_seconds=0) as watchdog:
        assert watchdog.lost_process(patience=5) is None
    assert not (tmp_path / "run").exists()


def test_the_same_line_is_said_once(tmp_path):
    assert not main_said(tmp_path, "x", patience=0.1)
    (tmp_path / SIGNS).mkdir()
    (tmp_path / SIGNS / "0").write_text(json.dumps({"left": "x"}))
    assert main_said(tmp_path, "x")
    assert not main_said(tmp_path, "y")
