"""Runs in processes of their own that something happens to, at an exact file operation.

Python reports file operations to audit hooks, so a process can be killed just before it renames
a checkpoint, or find the disk full from the moment it opens one: no timing, no changed code.
"""

import fnmatch
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import transformers
import yaml

from hive_vision.cli import main
from hive_vision.folders import read_json
from hive_vision.training.arguments import PretrainArguments

FULL_AT = 32 * 1024  # bytes that a file may have on a full disk: logs may, weights may not

# Forks of a server that has imported everything: what a fresh process does, seconds earlier.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hive_vision.cli.pretrain", "hive_vision.training.pretrain"])


@dataclass(frozen=True)
class Strike:
    """Something that happens to a run at one of its file operations.

    Args:
        at: Shell pattern of the operation (write, rename, rmtree) and a path in the run folder,
            e.g. ``write stage1/result.json.partial``.
        count: At which of the operations that fit.
        action: A signal, or the disk is full from here on.
        after: Seconds to wait first.
    """

    at: str
    count: int = 1
    action: signal.Signals | Literal["disk full"] = signal.SIGKILL
    after: float = 0.0


def write_recipe(path: Path, arguments: PretrainArguments) -> Path:
    """Write a recipe as a user would have it."""
    content = json.loads(json.dumps(asdict(arguments)))  # tuples as lists
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def start(recipe: Path, output: Path, *strikes: Strike, keys: tuple[str, ...] = ()) -> Any:
    """Start ``hive-vision pretrain`` in a process; its output goes to ``OUTPUT.log``."""
    argv = ["pretrain", str(recipe), f"output={output}", *keys]
    process: ForkServerProcess = CONTEXT.Process(target=_run, args=(argv, output, strikes))
    process.start()
    return process


def run(
    recipe: Path, output: Path, *strikes: Strike, keys: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Run ``hive-vision pretrain``; its exit code (-9 if killed) and what it wrote."""
    process = start(recipe, output, *strikes, keys=keys)
    process.join()
    return process.exitcode, log_of(output).read_text(encoding="utf-8")


def log_of(output: Path) -> Path:
    """Where a run's process writes stdout and stderr."""
    return output.with_name(f"{output.name}.log")


def _run(argv: list[str], output: Path, strikes: tuple[Strike, ...]) -> None:
    log = os.open(log_of(output), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    # What the command line sets before transformers is imported.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if strikes:
        _arm(output, list(strikes))
    main(argv)


def _arm(output: Path, strikes: list[Strike]) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not strikes:
            return
        operation = _operation(event, arguments, output)
        if operation is None or not fnmatch.fnmatchcase(operation, strikes[0].at):
            return
        seen += 1
        if seen < strikes[0].count:
            return
        strike, seen = strikes.pop(0), 0
        time.sleep(strike.after)
        if strike.action == "disk full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), strike.action)

    sys.addaudithook(hook)


def _operation(event: str, arguments: tuple[Any, ...], output: Path) -> str | None:
    """A file operation below the run folder, as a strike's pattern sees it."""
    match event:
        case "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
            name = "write" if writes else "read"
        case "os.rename":
            path, name = arguments[1], "rename"
        case "shutil.rmtree":
            path, name = arguments[0], "rmtree"
        case _:
            return None
    if isinstance(path, int) or path is None:
        return None
    try:
        return f"{name} {Path(os.fsdecode(path)).relative_to(output)}"
    except ValueError:
        return None


def logged(run_folder: Path) -> list[dict[str, Any]]:
    """What every step and every held-out loss logged, without clocks."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    numbers = [json.loads(line) for line in lines]
    return [line for line in numbers if "loss" in line or "held_out_loss" in line]


def outcome(run_folder: Path) -> dict[str, Any]:
    """What a disturbed run and an undisturbed one have to agree on: every byte, every loss."""
    stages = sorted(run_folder.glob("stage*"))
    content: dict[str, Any] = {"logged": logged(run_folder)}
    for folder in (run_folder / "encoder", *(stage / "model" for stage in stages)):
        manifest = read_json(folder / "manifest.json")
        assert manifest is not None, folder
        content[f"{folder.relative_to(run_folder)}"] = manifest["files"]
    for stage in stages:
        result = read_json(stage / "result.json")
        assert result is not None, stage
        content[stage.name] = {key: result[key] for key in result if key != "seconds_per_step"}
        assert not list(stage.glob("*checkpoint*")), "a finished stage keeps no checkpoints"
    return content
