"""Naming samples that could not be used, and stopping a run with too many of them."""

import json
from dataclasses import asdict
from pathlib import Path

from hive_vision.data.replacement import BadSample
from hive_vision.folders import write_text
from hive_vision.training.errors import TrainingError
from hive_vision.training.processes import gather_lists, on_main


class BadSampleLog:
    """Names unusable samples in a file, once each, and stops the run when there are too many.

    Args:
        path: ``bad_samples.jsonl``; what an interrupted run wrote is kept.
        allowed: More different samples than this stop the run.
    """

    def __init__(self, path: Path, allowed: int) -> None:
        self.path = path
        self.allowed = allowed
        self._pending: list[BadSample] = []
        self._seen: set[int] = set()
        if path.exists():
            *lines, torn = path.read_text(encoding="utf-8").split("\n")
            self._seen = {json.loads(line)["sample_id"] for line in lines}
            if torn:  # by an interruption; the next line must not go on behind it
                on_main(lambda: write_text(path, "".join(f"{line}\n" for line in lines)))

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, bad_samples: list[BadSample]) -> None:
        """Remember what this process met; nothing is written yet."""
        self._pending += [bad for bad in bad_samples if bad.sample_id not in self._seen]

    def record(self) -> None:
        """Write down what any process met since the last call; all processes call it together.

        Raises:
            TrainingError: If there are more than allowed.
        """
        new = {bad.sample_id: bad for bad in gather_lists(self._pending)}
        self._pending = []
        new = {key: bad for key, bad in new.items() if key not in self._seen}
        if not new:
            return
        self._seen |= new.keys()
        lines = [json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in new.values()]
        on_main(lambda: self._append("".join(lines)))
        if len(self._seen) > self.allowed:
            raise TrainingError(
                f"{len(self._seen)} samples cannot be used, {self.allowed} are allowed; they are "
                f"named in {self.path}. Raise data.max_bad_fraction to go on, or have hive-vision "
                "data verify find them all and begin again with its list in another output folder"
            )

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
