"""Did a stage of pre-training make the encoder worse than the one it started from?"""

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hive_vision.evaluation.arguments import ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder
from hive_vision.evaluation.probe import ProbeResult, probe_encoder
from hive_vision.evaluation.statistics import paired_difference
from hive_vision.studies.probe import load_sets
from hive_vision.training.arguments import PretrainArguments

logger = logging.getLogger(__name__)


class RegressionGuard:
    """Probes an encoder on chosen sets against its base; says so if it got worse.

    Linear probe, protocol fast. Features are kept in the run folder.

    Args:
        arguments: The recipe; its ``probe_after_stage`` names the sets.

    Raises:
        ValueError: If a set cannot be used; found before anything is trained.
    """

    def __init__(self, arguments: PretrainArguments) -> None:
        self.base = arguments.model.vision
        self.probe = ProbeArguments(cache=str(Path(arguments.output) / "features"))
        self.sets = load_sets(arguments.probe_after_stage, self.probe)
        self._base_results: dict[str, ProbeResult] | None = None

    def __call__(
        self, stage: str, encoder: PreTrainedModel, image_processor: Any
    ) -> dict[str, Any]:
        """Compare the encoder after a stage with its base.

        Args:
            stage: Name of the stage.
            encoder: The encoder after it.
            image_processor: Its image processor.

        Returns:
            For each set both accuracies and their difference with its interval, as JSON.
        """
        if self._base_results is None:
            self._base_results = self._results(FrozenEncoder.load(self.base))
        now = self._results(FrozenEncoder(f"{stage}'s encoder", encoder, image_processor))
        found = {}
        for name, result in now.items():
            base = self._base_results[name]
            difference = paired_difference(result.correct, base.correct)
            found[name] = {
                "base": base.accuracy.mean,
                "now": result.accuracy.mean,
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
            }
            line = (
                f"{stage} on {name}: {100 * result.accuracy.mean:.1f}% against "
                f"{100 * base.accuracy.mean:.1f}% of its base, {100 * difference.mean:+.1f} "
                f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] points"
            )
            if difference.high < 0:
                logger.warning("worse than before: %s", line)
            else:
                logger.info("%s", line)
        return found

    def _results(self, encoder: FrozenEncoder) -> dict[str, ProbeResult]:
        return {data.name: probe_encoder(encoder, data, self.probe) for data in self.sets}
