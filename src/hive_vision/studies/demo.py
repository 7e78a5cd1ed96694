"""The paper in miniature: every method on the same data, side by side."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_vision.analysis.findings import MapFindings
from hive_vision.data.miniature.build import CLASSIFICATION_SETS
from hive_vision.evaluation.arguments import ProbeArguments
from hive_vision.evaluation.probe import ProbeResult
from hive_vision.folders import read_json
from hive_vision.studies.maps import MapsArguments, look_inside
from hive_vision.studies.probe import compare_encoders
from hive_vision.training.arguments import Method
from hive_vision.training.miniature import MiniatureSettings, ensure_miniature

logger = logging.getLogger(__name__)

_LOOKED_AT = 32  # held-out samples, of which a look at each method takes some seconds


@dataclass(frozen=True)
class Demo:
    """What a demo found.

    Attributes:
        runs: For each method its ``results.json``.
        accuracies: Method -> classification set -> result.
    """

    runs: list[dict[str, Any]]
    accuracies: dict[str, dict[str, ProbeResult]]


def run_demo(
    recipe: str, output: Path, miniature: MiniatureSettings, methods: Sequence[Method]
) -> Demo:
    """Pre-train with each method in a process of its own, then probe the encoders.

    One process for each method, because the peak memory of a process only grows.

    Args:
        recipe: Recipe of the methods' runs.
        output: Folder for the runs, ``output/hive`` and so on.
        miniature: The data and models of the recipe.
        methods: Which methods.

    Raises:
        RuntimeError: If a method's run failed; its own message was printed.
    """
    folder = ensure_miniature(miniature)
    runs = []
    for method in methods:
        logger.info("method %s", method)
        run = output / method
        command = [sys.executable, "-m", "hive_vision", "pretrain", recipe]
        quiet = ["--quiet"] if sys.stderr.isatty() else []  # on a terminal there is a bar
        with subprocess.Popen([*command, f"method={method}", f"output={run}", *quiet]) as process:
            try:
                process.wait()
            except KeyboardInterrupt:
                process.wait()  # it got the same Ctrl-C and is saving
                raise
        if process.returncode != 0:
            raise RuntimeError(f"method {method} failed, see above; run the same command again")
        result = read_json(run / "results.json")
        assert result is not None
        runs.append(result)
    probe = ProbeArguments(cache=str(output / "features"))
    sets = [str(folder / "data" / "classification" / name) for name in CLASSIFICATION_SETS]
    encoders: dict[str, str] = {method: str(output / method / "encoder") for method in methods}
    return Demo(runs, compare_encoders(encoders, sets, probe))


def look_into_demo(
    output: Path, miniature: MiniatureSettings, methods: Sequence[Method]
) -> MapFindings:
    """Look into the models of a demo that has run.

    Args:
        output: Folder with the runs.
        miniature: The data and models of the recipe.
        methods: Which methods.
    """
    data = Path(miniature.folder) / "data"
    look = MapsArguments(
        data=str(data / "captions" / "validation"),
        masks=str(data / "masks" / "validation"),
        samples=1,
        flow_samples=_LOOKED_AT,
    )
    return look_inside({method: str(output / method) for method in methods}, look)
