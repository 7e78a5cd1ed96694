"""The run folder: what a run was asked to do, what it did, and where it stands.

recipe.yaml        the resolved recipe            stage1/ stage2/ stage3/
environment.json   versions and hardware            checkpoint-N/  while the stage runs
metrics.jsonl      every logged number              model/         when it is done
bad_samples.jsonl  samples that were replaced       result.json    its losses and proof
features/          of all images, while needed
results.json       the summary                    encoder/         the plain encoder
"""

import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from hive_vision.folders import acquire, flatten, read_json, write_json, write_text
from hive_vision.settings import read_settings
from hive_vision.training.arguments import RunArguments
from hive_vision.training.processes import on_main
from hive_vision.training.watchdog import SIGNS

PACKAGES = ("hive-vision", "torch", "transformers", "accelerate", "datasets", "tokenizers")


LOCK = ".lock"
_OURS = (LOCK, SIGNS)  # may lie in a folder that is no run yet


class RunFolder:
    """Opens a new run or goes on with an interrupted one.

    Args:
        arguments: The recipe; its ``output`` is the folder.
    """

    def __init__(self, arguments: RunArguments) -> None:
        self.path = Path(arguments.output)
        self._kind = type(arguments)
        self.recipe = _plain(asdict(arguments))
        self._lock: IO[str] | None = None

    def check(self) -> None:
        """Refuse what this recipe cannot be run in.

        Raises:
            ValueError: If the folder is a file, holds something that is not a run, or a run of
                another recipe.
        """
        if self.path.is_file():
            raise ValueError(f"output {str(self.path)!r} is a file; give a folder")
        if not self.path.is_dir() or all(path.name in _OURS for path in self.path.iterdir()):
            return
        saved = self.path / "recipe.yaml"
        if not saved.is_file():
            raise ValueError(
                f"output {str(self.path)!r} is not empty and not a run; give another folder"
            )
        # Through the parser: keys that came with a later version have their defaults.
        differences = recipe_differences(
            _plain(asdict(read_settings(self._kind, path=saved))), self.recipe
        )
        if differences:
            raise ValueError(
                f"{str(self.path)!r} holds a run of another recipe ({'; '.join(differences)}); "
                "give another output folder, or delete this one"
            )

    def create(self) -> None:
        """Write down recipe and environment, unless an earlier start did."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "recipe.yaml").exists():
            write_json(self.path / "environment.json", _environment())
            text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
            write_text(self.path / "recipe.yaml", text)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second start of the same run out while the first one works.

        Raises:
            ValueError: If another process works in the folder.
        """
        on_main(self._acquire)
        try:
            yield
        finally:
            if self._lock is not None:
                # What failed before it began leaves no folder.
                if [path.name for path in self.path.iterdir()] == [LOCK]:
                    shutil.rmtree(self.path)
                self._lock.close()

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = acquire(
            self.path / LOCK,
            f"another process is training in {str(self.path)!r}; wait for it or stop it first",
        )

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.path / name

    def stage_result(self, name: str) -> dict[str, Any] | None:
        """What a finished stage reported; ``None`` if it is not finished."""
        return read_json(self.stage(name) / "result.json")

    @property
    def results(self) -> dict[str, Any] | None:
        """The summary of a finished run; ``None`` if it is not finished."""
        return read_json(self.path / "results.json")

    @property
    def metrics(self) -> Path:
        """File with all logged numbers."""
        return self.path / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        """File that names unusable samples."""
        return self.path / "bad_samples.jsonl"

    @property
    def encoder(self) -> Path:
        """The exported encoder."""
        return self.path / "encoder"


# What may change between two starts of a run: how it is computed and watched, and what is done
# about the fault that stopped it; not what an undisturbed run computes.
FREE_KEYS = (
    "output",
    "micro_batch_size",
    "gradient_checkpointing",
    "log_every",
    "evaluate_every",
    "save_every",
    "data.num_workers",
    "data.max_bad_fraction",
    "faults.on_divergence",
    "faults.loss_spike",
    "faults.gradient_spike",
    "faults.max_events",
    "faults.stall_seconds",
    "faults.grace_seconds",
    "probe_after_stage",
    "cache_features",
    "keep_freed_memory",
)


def recipe_differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """List the keys in which two recipes differ, as ``key: saved -> given``."""
    old, new = flatten(saved), flatten(given)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON read them back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }
