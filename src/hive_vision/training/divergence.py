"""What happens to a step whose loss or gradient is not as it should be."""

import json
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from hive_vision.folders import read_json, write_json
from hive_vision.training.arguments import FaultArguments
from hive_vision.training.errors import RollBackError, TrainingError
from hive_vision.training.processes import gather_lists, on_main

logger = logging.getLogger(__name__)

WINDOW = 64  # accepted steps whose median a spike is compared with
ENOUGH = 16  # fewer say nothing about what is usual


class DivergenceGuard:
    """Judges every optimiser step before it is applied; all processes judge alike.

    Args:
        settings: The recipe's ``faults``.
        stage: The stage's folder; events and steps to leave out are kept there.
    """

    def __init__(self, settings: FaultArguments, stage: Path) -> None:
        self.settings = settings
        self.events = stage / "divergence.jsonl"
        self._skipped_path = stage / "skipped_steps.json"
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._dropped = 0
        skipped = read_json(self._skipped_path) or {"steps": [], "rollbacks": 0}
        self._left_out: set[int] = set(skipped["steps"])
        self._rollbacks: int = skipped["rollbacks"]

    @property
    def watches_loss(self) -> bool:
        """Whether the loss of each step is needed, which costs a word between processes."""
        return self.settings.loss_spike > 0

    def leaves_out(self, step: int) -> bool:
        """Whether a step, counted from 1, is passed over after a rollback."""
        return step in self._left_out

    def judge(self, step: int, loss: float, norm: float, sample_ids: list[int]) -> bool:
        """Decide about a step.

        Args:
            step: Counted from 1.
            loss: Mean over the step's supervised tokens; 0 if it is not watched.
            norm: Norm of all gradients before clipping.
            sample_ids: The step's samples on this process.

        Returns:
            Whether the step is to be applied.

        Raises:
            TrainingError: If the run is to stop.
            RollBackError: If the stage is to go back to its last good checkpoint.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self._losses.append(loss)
            self._norms.append(norm)
            return True
        action = self.settings.on_divergence
        used = self._rollbacks if action == "rollback" else self._dropped
        if action != "stop" and used >= self.settings.max_events:
            reason += f", after {used} earlier ones (faults.max_events)"
            action = "stop"
        ids = gather_lists(sample_ids)
        event = {"step": step, "reason": reason, "loss": str(loss), "grad_norm": str(norm)}
        on_main(lambda: self._append({**event, "action": action, "sample_ids": ids}))
        logger.warning("step %d: %s: %s", step, reason, action)
        if action == "stop":
            raise TrainingError(
                f"{reason} at step {step}; its samples are named in {self.events}. Lower the "
                "learning rates, look at these samples, or set faults.on_divergence to skip or "
                "rollback"
            )
        if action == "rollback":
            raise RollBackError(step)
        self._dropped += 1
        return False

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return f"loss or gradient is {norm if math.isfinite(loss) else loss}"
        watched = (
            ("loss", loss, self._losses, self.settings.loss_spike),
            ("gradient norm", norm, self._norms, self.settings.gradient_spike),
        )
        for name, value, history, limit in watched:
            if limit and len(history) >= ENOUGH:
                usual = statistics.median(history)
                if value > limit * usual:
                    return f"{name} {value:.4g} is over {limit:g} times the usual {usual:.4g}"
        return None

    def _append(self, event: dict[str, Any]) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def leave_out(self, first: int, last: int) -> None:
        """After a rollback: pass over the steps from the checkpoint to the bad one.

        Training goes on with the weights of the checkpoint and the data after the bad step.
        """
        self._left_out |= set(range(first, last + 1))
        self._rollbacks += 1
        content = {"steps": sorted(self._left_out), "rollbacks": self._rollbacks}
        on_main(lambda: write_json(self._skipped_path, content))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on judging alike."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "dropped": self._dropped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's ``state``."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._dropped = state["dropped"]
