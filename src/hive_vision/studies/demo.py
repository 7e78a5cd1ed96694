"""The paper in miniature: every method on the same data, side by side."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hive_vision.evaluation.probing import knn_accuracy
from hive_vision.folders import read_json, write_json
from hive_vision.training.arguments import Method
from hive_vision.training.foundations import MiniatureSettings, ensure_miniature

logger = logging.getLogger(__name__)


def run_demo(
    recipe: str, output: Path, miniature: MiniatureSettings, methods: Sequence[Method], probe: str
) -> list[dict[str, Any]]:
    """Pre-train with each method in a process of its own, then probe the encoders.

    One process for each method, because the peak memory of a process only grows.

    Args:
        recipe: Recipe of the methods' runs.
        output: Folder for the runs, ``output/hive`` and so on.
        miniature: The data and models of the recipe.
        methods: Which methods.
        probe: Classification set of the miniature, e.g. ``texture``.

    Returns:
        For each method its ``results.json`` with ``accuracy`` on the probe added; also written
        to ``output/results.json``.

    Raises:
        RuntimeError: If a method's run failed; its own message was printed.
    """
    folder = ensure_miniature(miniature)
    results = []
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
        result["accuracy"] = knn_accuracy(
            run / "encoder", folder / "data" / "classification" / probe
        )
        results.append(result)
    write_json(output / "results.json", {"probe": probe, "methods": results})
    return results
