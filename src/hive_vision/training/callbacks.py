"""What watches a stage: metrics as JSON lines, progress with an ETA, Ctrl-C and SIGTERM."""

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hive_vision.analysis.gradient_flow import GradientRecorder
from hive_vision.folders import write_text
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.processes import max_over_processes

logger = logging.getLogger(__name__)

REPORTS = 10  # progress lines for a stage when there is no terminal


class MetricsCallback(TrainerCallback):
    """Appends every log entry to ``metrics.jsonl``.

    Args:
        path: The file.
        stage: Name written on each line.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an interrupted run logged after its last checkpoint: it comes again."""
        state.compute_steps(args, args.max_steps)  # how often, as asked now and not back then
        if not (state.is_world_process_zero and self.path.exists()):
            return
        *lines, _ = self.path.read_text(encoding="utf-8").split("\n")
        kept = [line for line in lines if not self._is_repeated(json.loads(line), state)]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _is_repeated(self, line: dict[str, Any], state: TrainerState) -> bool:
        return bool(line["stage"] == self.stage and line["step"] > state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            line = {"stage": self.stage, "step": state.global_step, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class GradientFlowCallback(TrainerCallback):
    """Notes in ``metrics.jsonl`` how large the gradient at each encoder layer is.

    Args:
        recorder: Listens to the encoder.
        metrics: Writes the lines.
        every: Steps between records.
    """

    def __init__(self, recorder: GradientRecorder, metrics: MetricsCallback, every: int) -> None:
        self.recorder = recorder
        self.metrics = metrics
        self.every = every

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to a step that is to be noted."""
        if (state.global_step + 1) % self.every == 0:
            self.recorder.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what was heard; of a frozen encoder nothing is."""
        norms = [norm if math.isfinite(norm) else None for norm in self.recorder.stop()]
        if norms:
            self.metrics.on_log(args, state, control, {"encoder_gradients": norms})


class ProgressCallback(TrainerCallback):
    """A progress bar with an ETA on a terminal, a few log lines elsewhere.

    Args:
        stage: Name of the stage.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.loss = ""
        self.started = 0.0
        self.first_step = 0
        self.seconds_per_step = 0.0
        self._is_due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(
            self.stage, total=state.max_steps, completed=state.global_step, loss=self.loss
        )
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar; a line, now and then, waits for the loss of this step."""
        step, total = state.global_step, state.max_steps
        self.seconds_per_step = (time.monotonic() - self.started) / (step - self.first_step)
        if not state.is_world_process_zero:
            return
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, loss=self.loss)
        self._is_due = step == total or step % max(1, total // REPORTS) == 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}"
            if self.bar is not None and self.task is not None:
                self.bar.update(self.task, loss=self.loss)
            self._write_line(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the line about the step before, if its loss was not logged."""
        self._write_line(state)

    def _write_line(self, state: TrainerState) -> None:
        if not self._is_due or self.bar is not None:
            return
        self._is_due = False
        remaining = timedelta(
            seconds=round(self.seconds_per_step * (state.max_steps - state.global_step))
        )
        logger.info(
            "%s  %d/%d  %s  %.2f s/step  ETA %s",
            *(self.stage, state.global_step, state.max_steps, self.loss),
            *(self.seconds_per_step, remaining),
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last line, close the bar."""
        self._write_line(state)
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class InterruptCallback(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into "finish this step, save, stop", on all processes together.

    A second Ctrl-C stops at once; so does the first one outside of training, where nothing is
    lost. Use it as a context manager around the whole run.

    Args:
        grace_seconds: After SIGTERM, the longest time until the process ends in any case.
        stop_after: Stop like Ctrl-C after this stage and step, for proofs of resuming.
    """

    def __init__(self, grace_seconds: float, stop_after: tuple[str, int] | None = None) -> None:
        self.grace_seconds = grace_seconds
        self.stop_after = stop_after
        self.signal_number: int | None = None  # what asked this run to stop
        self.is_ending = False  # an error is being explained: no signal disturbs that
        self._is_training = False
        self._owner = os.getpid()
        self._first = 0.0
        self._timer: threading.Timer | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "InterruptCallback":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner or self.is_ending:
            return  # a worker of the loader: the trainer ends it when the step is saved
        if self.signal_number is not None:
            # A launcher passes on the Ctrl-C that this process got from the terminal as well.
            if number == signal.SIGINT and time.monotonic() - self._first > 1:
                raise KeyboardInterrupt
            return
        self.signal_number, self._first = number, time.monotonic()
        if not self._is_training:
            raise InterruptedRunError("stopped between steps", number)
        if number == signal.SIGINT:
            logger.warning("stopping after this step; press Ctrl-C again to stop at once")
            return
        logger.warning("stopping after this step, within %g s", self.grace_seconds)
        self._timer = threading.Timer(self.grace_seconds, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        sys.stderr.write(
            f"hive-vision: not saved within {self.grace_seconds:g} s of SIGTERM "
            "(faults.grace_seconds); the same command goes on from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end."""
        if self.stop_after == (Path(args.output_dir).name, state.global_step):
            self.signal_number = signal.SIGINT
        # Processes get a signal in different steps, but have to stop in the same one.
        agreed = int(max_over_processes(self.signal_number or 0))
        if agreed:
            self.signal_number = agreed
            control.should_save = control.should_training_stop = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal waits for the end of the step."""
        self._is_training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal ends the run at once: the last step is saved."""
        self._is_training = False
