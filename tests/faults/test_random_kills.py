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


def stage_of(run_folder):
    """The last line of metrics: where a strike found the run."""
    metrics = run_folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return ", ".join(lines[-1].split(", ")[:2]).replace('"', "").strip("{") if lines else "start"


@pytest.fixture(scope="module")
def undisturbed(small_recipe, tmp_path_factory):
    """Recipe, outcome and seconds of each method without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for method in METHODS:
        recipe = write_recipe(
            folder / f"{method}.yaml", small_recipe(folder / method, method=method)
        )
        began = time.monotonic()
        assert run(recipe, folder / method)[0] == 0
        found[method] = recipe, outcome(folder / method), time.monotonic() - began
    return found


@pytest.mark.parametrize("number", range(RUNS))
def test_killed_again_and_again(undisturbed, tmp_path, number, capsys):
    method = METHODS[number % len(METHODS)]
    recipe, expected, seconds = undisturbed[method]
    random = np.random.default_rng(number)
    output = tmp_path / "run"
    struck = 0
    for attempt in range(KILLS):
        process = start(recipe, output)
        # The further along a run is, the sooner it would end: strike within a share of it.
        process.join(float(random.uniform(0.1, 0.8)) * seconds / (1 + attempt / 2))
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
