"""The long suite (``make test-faults``): 25 kills at random times over all stages and methods.

Not collected by ``make test``. Every run is killed several times, goes on, and has to end with the
same bytes and the same logged losses as one that nothing happened to.
"""

import os
import signal
import sys
import time

import numpy as np
import pytest

from tests.integration.conftest import small_models, small_recipe
from tests.integration.faults import outcome, run, start, write_recipe

__all__ = ["small_models", "small_recipe"]

METHODS = ("hive", "sa", "cascaded")
RUNS = 5
KILLS = 5  # in each run
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def report(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def lines_of(run_folder):
    metrics = run_folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for(process, run_folder, lines):
    while process.is_alive() and lines_of(run_folder) < lines:
        time.sleep(0.002)


def stage_of(run_folder):
    """The last line of metrics: where a strike found the run."""
    if not lines_of(run_folder):
        return "start"
    last = (run_folder / "metrics.jsonl").read_text().splitlines()[-1]
    return ", ".join(last.split(", ")[:2]).replace('"', "").strip("{")


@pytest.fixture(scope="module")
def undisturbed(small_recipe, tmp_path_factory):
    """Recipe and outcome of each method without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for method in METHODS:
        recipe = write_recipe(
            folder / f"{method}.yaml", small_recipe(folder / method, method=method)
        )
        assert run(recipe, folder / method)[0] == 0
        found[method] = recipe, outcome(folder / method)
    return found


@pytest.mark.parametrize("number", range(RUNS))
def test_killed_again_and_again(undisturbed, tmp_path, number, capsys):
    method = METHODS[number % len(METHODS)]
    recipe, expected = undisturbed[method]
    random = np.random.default_rng(number)
    output = tmp_path / "run"
    struck = 0
    for _ in range(KILLS):
        process = start(recipe, output)
        # Some steps further than it came last time, and any moment after that one.
        wait_for(process, output, lines_of(output) + int(random.integers(1, 7)))
        time.sleep(float(random.uniform(0, 0.1)))
        where = stage_of(output)
        number_of = SIGNALS[int(random.integers(len(SIGNALS)))]
        if process.is_alive():
            os.kill(process.pid, number_of)
            struck += 1
        process.join()
        with capsys.disabled():
            report(f"  {method:<9}{number_of.name:<9}{where:<26}exit {process.exitcode}")
    assert run(recipe, output)[0] == 0
    assert outcome(output) == expected
    with capsys.disabled():
        report(f"  {method:<9}{struck} of {KILLS} struck; survived, samples lost 0")
