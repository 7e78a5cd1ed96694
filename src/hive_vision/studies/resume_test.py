"""Proof on the user's own machine and data that N + N steps are 2N steps."""

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hive_vision.folders import check_keys
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.miniature import ensure_miniature
from hive_vision.training.pretrain import pretrain

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageProof:
    """What two runs of a stage have in common.

    Attributes:
        name: Of the stage.
        losses_equal: Every logged loss is the same number, and none is missing or doubled.
        weights_equal: Every weight is the same, bit for bit.
        largest_difference: Between two values of the same weight.
        weight: The name of that weight; empty if all are equal.
    """

    name: str
    losses_equal: bool
    weights_equal: bool
    largest_difference: float
    weight: str

    @property
    def holds(self) -> bool:
        """Whether losses and weights are the same."""
        return self.losses_equal and self.weights_equal


@dataclass(frozen=True)
class ResumeProof:
    """What ``prove_resume`` found.

    Attributes:
        steps: N.
        stages: The interrupted run beside the undisturbed one.
        control: If they differ, a second undisturbed run beside the first.
        kept: If they differ, the folder with the runs.
    """

    steps: int
    stages: list[StageProof]
    control: list[StageProof]
    kept: Path | None

    @property
    def holds(self) -> bool:
        """Whether every stage is the same."""
        return all(stage.holds for stage in self.stages)

    @property
    def verdict(self) -> str:
        """One line: what was found, and if it is not equality, what may cause it."""
        if self.holds:
            return f"proven: {self.steps} + {self.steps} steps are {2 * self.steps} steps, exactly"
        largest = max(stage.largest_difference for stage in self.stages)
        found = f"not equal: weights differ by up to {largest:.3g}"
        if all(stage.holds for stage in self.control):
            return (
                f"{found}, while two undisturbed runs are equal: resuming loses something here, "
                f"please report it; the runs are kept in {self.kept}"
            )
        usual = max(stage.largest_difference for stage in self.control)
        return (
            f"{found}, but so do two undisturbed runs, by up to {usual:.3g}: some operations on "
            "this device add in any order, as GPUs' atomic additions do; nothing is wrong with "
            f"resuming if the two are alike; the runs are kept in {self.kept}"
        )


def prove_resume(arguments: PretrainArguments, steps: int) -> ResumeProof:
    """Train 2N steps of every stage, undisturbed and stopped after N, and compare.

    Each start has a process of its own. The runs lie in a folder beside the recipe's output.

    Args:
        arguments: The recipe. Only the number of steps, ``log_every`` and ``save_every`` are
            replaced.
        steps: N.

    Raises:
        ValueError: If the recipe trains nothing, or does not fit models or data.
    """
    names = [name for name, stage in arguments.stages.items() if stage.max_steps != 0]
    if arguments.method == "base" or not names:
        raise ValueError("this recipe trains nothing, so nothing can be resumed; choose a method")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("resume-test proves one process; start it without torchrun or accelerate")
    if arguments.miniature is not None:
        ensure_miniature(arguments.miniature)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.resume-test-", dir=output.parent))
    shown = f"{len(names)} x {2 * steps} steps"
    with ExitStack() as unless_kept:
        unless_kept.callback(shutil.rmtree, folder, ignore_errors=True)
        undisturbed = _shortened(arguments, folder / "undisturbed", 2 * steps)
        _start(undisturbed, None, f"undisturbed, {shown}")
        stopped = _shortened(arguments, folder / "stopped", 2 * steps)
        for name in names:
            _start(stopped, (name, steps), f"another run, until step {steps} of {name}")
        _start(stopped, None, "gone on with, until the end")
        proof = _compare(folder / "undisturbed", folder / "stopped", names)
        if all(stage.holds for stage in proof):
            return ResumeProof(steps, proof, [], None)
        unless_kept.pop_all()
    again = _shortened(arguments, folder / "undisturbed-again", 2 * steps)
    _start(again, None, f"they differ: undisturbed once more, {shown}")
    control = _compare(folder / "undisturbed", folder / "undisturbed-again", names)
    return ResumeProof(steps, proof, control, folder)


def _shortened(arguments: PretrainArguments, output: Path, steps: int) -> PretrainArguments:
    """The recipe with fewer steps; every one is logged, and only stopping saves."""
    stage1, stage2, stage3 = (
        stage if stage.max_steps == 0 else replace(stage, max_steps=steps, epochs=None)
        for stage in arguments.stages.values()
    )
    return replace(
        arguments,
        output=str(output),
        stage1=stage1,
        stage2=stage2,
        stage3=stage3,
        log_every=1,
        save_every=0,
        miniature=None,
    )


def _start(arguments: PretrainArguments, stop: tuple[str, int] | None, title: str) -> None:
    """Run or go on in a fresh process, until the stop."""
    logger.info("%s ...", title)
    began = time.monotonic()
    context = multiprocessing.get_context("forkserver")  # as fresh as spawn, and can import ahead
    try:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            stopped = process.submit(_pretrain_until, arguments, stop).result()
    except BrokenProcessPool as error:
        raise RuntimeError(f"the process of the run ended by itself: {title}") from error
    if stopped != (stop is not None):
        raise KeyboardInterrupt
    logger.info("  %.0f s", time.monotonic() - began)


def _pretrain_until(arguments: PretrainArguments, stop: tuple[str, int] | None) -> bool:
    """Whether the run was stopped, in the other process."""
    try:
        pretrain(arguments, stop_after=stop)
    except InterruptedRunError:
        return True
    return False


def _compare(first: Path, second: Path, stages: Sequence[str]) -> list[StageProof]:
    proof = []
    for name in stages:
        difference, weight = _largest_difference(first / name / "model", second / name / "model")
        losses_equal = _losses(first, name) == _losses(second, name)
        proof.append(StageProof(name, losses_equal, not weight, difference, weight))
    return proof


def _losses(run: Path, stage: str) -> list[tuple[int, float | None, float | None]]:
    """Step and losses of each line of a stage; its last line has clocks and no loss."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [
        (line["step"], line.get("loss"), line.get("held_out_loss"))
        for line in lines
        if line["stage"] == stage and line.keys() & {"loss", "held_out_loss"}
    ]


def _largest_difference(first: Path, second: Path) -> tuple[float, str]:
    """How far two models' weights are apart, and in which weight; no name if all are equal."""
    largest, name = 0.0, ""
    files = [_files_of_weights(folder) for folder in (first, second)]
    check_keys(files[0], files[1], second)
    for key in files[0]:
        one, other = (_read(places[key], key) for places in files)
        bits = [weight.reshape(-1).view(torch.uint8) for weight in (one, other)]
        if torch.equal(*bits):
            continue
        difference = float((one.double() - other.double()).abs().max())
        if not name or not difference <= largest:
            largest, name = difference, key
    return largest, name


def _files_of_weights(model: Path) -> dict[str, Path]:
    """The file that each weight lies in: large models have several."""
    places: dict[str, Path] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        weight: Tensor = file.get_tensor(key)
    return weight
