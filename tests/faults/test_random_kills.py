"""The long suite (``make test-faults``): 25 kills at random moments over all stages and methods.

Not collected by ``make test``. Every run is ended several times, goes on, and has to end with the
same bytes and the same logged losses as one that nothing happened to. Prints a line for each kill.
"""

import os
import signal
import sys
import time

import numpy as np
import pytest

from tests.integration.conftest import BATCH, STEPS, small_models, small_recipe
from tests.integration.faults import logged, outcome, run, start, write_recipe

__all__ = ["small_models", "small_recipe"]

KILLS = {"hive": 9, "sa": 8, "cascaded": 8}
IN_ONE_RUN = 6  # kills at most
LOADING = 2.0  # seconds in which a start has not logged anything yet
# kill -9 mostly; a job's end; Ctrl-C
SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT)
ROW = "  {:<9}{:<9}{:<30}{:<6}{:<9}{}\n"


def lines_of(run_folder):
    metrics = run_folder / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def where(run_folder):
    """What a run was doing when it was struck."""
    for aside in run_folder.rglob(".*.partial"):
        return f"writing {aside.relative_to(run_folder)}".replace(".partial", "")
    lines = lines_of(run_folder)
    stage, step = lines[-1].split(", ")[:2] if lines else ("start", "step 0")
    return " ".join(f"{stage}, after {step}".translate(str.maketrans("", "", '{":')).split()[-4:])


def strike(process, output, random):
    """End a process at a random moment: while it loads, or some steps further on."""
    lines = len(lines_of(output)) + int(random.integers(0, 2 * STEPS))
    if lines == len(lines_of(output)):
        process.join(random.uniform(0, LOADING))
    while process.is_alive() and len(lines_of(output)) < lines:
        time.sleep(0.002)
    process.join(random.uniform(0, 0.15))
    number = SIGNALS[int(random.integers(len(SIGNALS)))]
    if process.is_alive():
        os.kill(process.pid, number)
        # What it leaves: after kill -9 where it stood, else where it was saved.
        process.join()
    return number.name, where(output)


def samples_lost(output, expected):
    """Samples of all steps that are missing, doubled or different in a run's log."""
    found, whole = logged(output), expected["logged"]
    wrong = sum(line not in found for line in whole) + sum(line not in whole for line in found)
    return BATCH * max(wrong, abs(len(found) - len(whole)))


@pytest.mark.parametrize("method", KILLS)
def test_killed_again_and_again(small_recipe, tmp_path, method, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe(tmp_path / "run", method=method))
    assert run(recipe, tmp_path / "undisturbed")[0] == 0
    expected = outcome(tmp_path / "undisturbed")
    random = np.random.default_rng([len(method), KILLS[method]])
    struck = 0
    with capsys.disabled():
        sys.stdout.write("\n" + ROW.format("method", "signal", "where", "exit", "survived", "lost"))
    for number in range(KILLS[method]):
        if struck == KILLS[method]:
            break
        output, rows = tmp_path / f"run{number}", []
        kills = min(KILLS[method] - struck, int(random.integers(2, IN_ONE_RUN + 1)))
        while len(rows) < kills:
            process = start(recipe, output)
            name, place = strike(process, output, random)
            if process.exitcode == 0:
                break  # it was done before
            rows.append((name, place, process.exitcode))
        assert run(recipe, output)[0] == 0
        struck += len(rows)
        survived, lost = outcome(output) == expected, samples_lost(output, expected)
        with capsys.disabled():
            for row in rows:
                sys.stdout.write(ROW.format(method, *row, "yes" if survived else "NO", lost))
            sys.stdout.flush()
        assert survived
        assert lost == 0
    assert struck == KILLS[method]
