"""The stages of a run one after another, whatever they train: checkpoints, proofs, results."""

import gc
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from hive_vision.analysis.gradient_flow import GradientRecorder
from hive_vision.folders import check_folder, read_json, read_manifest, write_json
from hive_vision.models.backbones import backbones_of, hash_tensors
from hive_vision.models.pixels import SplitProcessor
from hive_vision.training.arguments import RunArguments, StageArguments
from hive_vision.training.bad_samples import BadSampleLog
from hive_vision.training.callbacks import (
    GradientFlowCallback,
    InterruptCallback,
    MetricsCallback,
    ProgressCallback,
)
from hive_vision.training.checkpoints import (
    last_checkpoint,
    load_strictly,
    remove_checkpoints,
    save_stage_model,
    step_of,
)
from hive_vision.training.divergence import DivergenceGuard
from hive_vision.training.errors import InterruptedRunError, RollBackError, TrainingError
from hive_vision.training.feature_cache import FeatureCache
from hive_vision.training.hardware import (
    is_sharded,
    prepare_model,
    split_batch,
    training_arguments,
)
from hive_vision.training.processes import on_main, start_processes
from hive_vision.training.run_data import RunData
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import (
    apply_rules,
    check_gradient_path,
    describe_parts,
    parameter_groups,
    prove_update,
    sharded_classes,
    whole_weights,
)
from hive_vision.training.trainer import HiveTrainer
from hive_vision.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

A = TypeVar("A", bound=RunArguments)


def run_job(
    arguments: A,
    work: Callable[[RunFolder, Watchdog, InterruptCallback], dict[str, Any]],
    stop_after: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Open the run folder and do the work inside, watched and interruptible; once.

    Args:
        arguments: The recipe.
        work: Makes the job and runs it.
        stop_after: Stop as Ctrl-C does after this stage and step, e.g. ``("stage2", 100)``.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: If the recipe, the models or the data do not fit together.
        InterruptedRunError: After Ctrl-C or SIGTERM; the same call goes on from the checkpoint.
    """
    processes = start_processes()
    run = RunFolder(arguments)
    on_main(run.check)
    if run.results is not None:
        logger.info("%s is already finished; nothing to do", run.path)
        return run.results
    watchdog = Watchdog(
        run.path, processes.process_index, processes.num_processes, arguments.faults.stall_seconds
    )
    interrupt = InterruptCallback(arguments.faults.grace_seconds, stop_after)
    with interrupt, run.locked(), watchdog:
        try:
            return work(run, watchdog, interrupt)
        except RuntimeError as error:
            # What a collective operation says when another process died does not name it.
            interrupt.is_ending = True
            lost = watchdog.lost_process(patience=5)
            if lost is None:
                raise
            raise TrainingError(f"{lost}; run the same command again to go on") from error


class Job(ABC, Generic[A]):
    """Everything that the stages share: data, processor, and the model they hand on.

    A kind of training says what the model is, what it reads and what comes out.

    Args:
        arguments: The recipe.
        run: Its folder.
        watchdog: Is told what begins.
        interrupt: Knows when to stop.
    """

    processor: Any

    def __init__(
        self, arguments: A, run: RunFolder, watchdog: Watchdog, interrupt: InterruptCallback
    ) -> None:
        self.arguments = arguments
        self.run = run
        self.watchdog = watchdog
        self.interrupt = interrupt
        self.processor = self.load_processor()
        self.pixels = SplitProcessor(self.processor.image_processor)
        self.cache = FeatureCache(arguments, run.path / "features", self.pixels, watchdog)
        self.data = self.load_data()
        self.bad_samples = self.open_bad_samples()
        self.stages = self.checked_stages()
        finished = [name for name in self.stages if run.stage_result(name) is not None]
        self._handed_on = run.stage(finished[-1]) / "model" if finished else None
        self.model = self.load_model(self._handed_on)
        self._is_fresh = True
        # Found by tracing the encoder, which takes a while: once for all stages.
        self.groups = parameter_groups(self.model) if self.stages else {}
        self._frozen: set[str] = set()  # stages that freeze the encoder
        for name in reversed(self.stages):
            apply_rules(self.model, self.stages[name].rules, self.groups)
            if not any(p.requires_grad for p in backbones_of(self.model)[0].parameters()):
                self._frozen.add(name)
        if self.stages and not finished:
            check_gradient_path(self.model)

    @abstractmethod
    def load_processor(self) -> Any:
        """Load what prepares images and text."""

    @abstractmethod
    def load_data(self) -> Mapping[str, RunData[Any]]:
        """Load what each stage reads."""

    @abstractmethod
    def open_bad_samples(self) -> Mapping[str, BadSampleLog]:
        """Open the log of each stage's unusable samples."""

    @property
    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """What a stage's model is loaded as."""

    @abstractmethod
    def first_model(self) -> PreTrainedModel:
        """Make the model that the first stage begins with."""

    @abstractmethod
    def collator(self, model: PreTrainedModel) -> Any:
        """Make what makes batches."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest of every folder says of models and method."""

    def after_stage(self, name: str, result: dict[str, Any]) -> None:
        """Look at what a finished stage left; may add to its result."""

    def checked_stages(self) -> dict[str, StageArguments]:
        """The stages that have steps to do."""
        world_size = PartialState().num_processes
        chosen = {}
        for name, stage in self.arguments.stages.items():
            try:
                if stage.steps(self.data[name].samples) == 0:
                    continue
                split_batch(stage.batch_size, self.arguments.micro_batch_size, world_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            chosen[name] = stage
        return chosen

    def renew_model(self) -> None:
        """Load the model again once it was trained.

        From its folder also when a stage finished a moment ago: a resumed run does the same.
        """
        if not self._is_fresh:
            del self.model
            gc.collect()
            self.model = self.load_model(self._handed_on)
        self._is_fresh = False

    def load_model(self, folder: Path | None) -> PreTrainedModel:
        """Load the model that a finished stage handed on, or make the first one."""
        if folder is None:
            set_seed(self.arguments.seed)
            return self.first_model()
        self._check_same_data(folder, on_main(lambda: check_folder(folder, "model")))
        return load_strictly(self.model_class, folder)

    def facts(self, name: str) -> dict[str, Any]:
        """What the manifest of every folder of a stage says."""
        return {
            "version": version("hive-vision"),
            **self.describe(),
            "data": self.data[name].facts,
            "stage": name,
        }

    def _check_same_data(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Refuse to go on with other data than a checkpoint or stage was trained on."""
        data = self.data[manifest["stage"]]
        saved, given = manifest["data"], data.facts
        if saved != given:
            raise ValueError(
                f"{folder} was trained on {saved[data.unit]} {data.unit} with fingerprint "
                f"{saved['fingerprint']}, but the data now has {given[data.unit]} with "
                f"{given['fingerprint']}; restore the data or give another output folder"
            )

    def _check_same_sharding(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        """Refuse a checkpoint whose weights lie in another kind of files."""
        if manifest["sharded"] != is_sharded(self.arguments):
            how = "several processes with sharding=fsdp2" if manifest["sharded"] else "whole models"
            raise ValueError(
                f"{checkpoint} was written by {how}, this start would go on with "
                f"{PartialState().num_processes} and sharding={self.arguments.sharding}; go on as "
                "before, or delete the checkpoints of this stage"
            )

    def trainer(
        self,
        name: str,
        stage: StageArguments,
        parts: Any,
        data: RunData[Any] | None = None,
        **kwargs: Any,
    ) -> HiveTrainer:
        """Set up a stage's trainer around the current model, on its data if none are given."""
        folder, data = self.run.stage(name), data or self.data[name]
        trainer = HiveTrainer(
            self.model,
            training_arguments(
                self.arguments,
                stage,
                folder,
                stage.steps(data.samples),
                sharded_classes(self.model),
                data.num_workers,
            ),
            parts=parts,
            train_data=data.train,
            held_out=data.held_out,
            collator=self.collator(self.model),
            pixels=self.pixels,
            bad_samples=self.bad_samples[name],
            guard=DivergenceGuard(self.arguments.faults, folder),
            watchdog=self.watchdog,
            facts={**self.facts(name), "sharded": is_sharded(self.arguments)},
            min_learning_rate=stage.min_learning_rate,
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train_stages(self) -> list[dict[str, Any]]:
        """Train what is not finished; the results of all stages."""
        return [self.train_stage(name) for name in self.stages]

    def train_stage(self, name: str) -> dict[str, Any]:
        """Train one stage, prove what moved, and leave its model in the run folder."""
        folder, stage = self.run.stage(name), self.stages[name]
        result = self.run.stage_result(name)
        if result is not None:
            logger.info("%s is already finished", name)
        else:
            steps, unit = stage.steps(self.data[name].samples), self.data[name].unit
            logger.info("%s: %d steps of %d %s", name, steps, stage.batch_size, unit)
        while result is None:
            try:
                result = self._train(name, stage, folder)
                self._handed_on = folder / "model"
            except RollBackError as rollback:
                self._roll_back(name, folder, rollback.step)
        on_main(lambda: remove_checkpoints(folder))
        if len(self._with_same_features(name)) < 2:
            on_main(self.cache.remove)
        self.after_stage(name, result)
        return result

    def _roll_back(self, name: str, folder: Path, step: int) -> None:
        checkpoint = on_main(lambda: last_checkpoint(folder))
        good = step_of(checkpoint) if checkpoint else 0
        DivergenceGuard(self.arguments.faults, folder).leave_out(good + 1, step)
        logger.warning("%s goes back to step %d, without the data up to step %d", name, good, step)

    def _train(self, name: str, stage: StageArguments, folder: Path) -> dict[str, Any]:
        """Go on from the stage's last good checkpoint, or start it."""
        self.renew_model()
        prepare_model(self.model, self.arguments, self.groups)
        parts = apply_rules(self.model, stage.rules, self.groups)
        check_gradient_path(self.model)
        logger.info("%s", describe_parts(parts))
        names = [name for part in parts for name in part.names]
        before = on_main(lambda: self._remember_start(folder, names))
        checkpoint = on_main(lambda: last_checkpoint(folder))
        if checkpoint is not None:
            manifest = read_manifest(checkpoint, "checkpoint")
            self._check_same_data(checkpoint, manifest)
            self._check_same_sharding(checkpoint, manifest)
            logger.info("%s goes on from step %d", name, step_of(checkpoint))
        progress = ProgressCallback(name)
        metrics = MetricsCallback(self.run.metrics, name)
        callbacks: list[TrainerCallback] = [metrics, progress, self.interrupt]
        if self.arguments.gradients_every:
            recorder = GradientRecorder(backbones_of(self.model)[0])
            every = self.arguments.gradients_every
            callbacks.append(GradientFlowCallback(recorder, metrics, every))
        data, readers = self.data[name], self._with_same_features(name)
        if readers:
            stages = [self.stages[reader] for reader in readers]
            data = self.cache.data_of(self.model, data, stages, folder)
        trainer = self.trainer(name, stage, parts, data, callbacks=callbacks)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
        if self.interrupt.signal_number is not None:
            raise InterruptedRunError(
                f"{name} stopped after step {trainer.state.global_step}, saved",
                self.interrupt.signal_number,
            )
        losses = {
            "held_out_loss": trainer.held_out_loss(),
            "held_out_loss_shuffled_images": trainer.held_out_loss("shuffled"),
        }
        loss, shuffled = losses.values()
        if not math.isfinite(loss):
            raise TrainingError(f"{name} ended with a held-out loss of {loss}; lower its rates")
        self.watchdog.progress(f"writing the model of {name}")
        weights = whole_weights(self.model)
        result = {
            "name": name,
            "steps": stage.steps(self.data[name].samples),
            "seconds_per_step": progress.seconds_per_step,
            "trained_parameters": sum(p.size for p in parts if p.learning_rate is not None),
            **losses,
        }

        def finish() -> dict[str, Any]:
            proof = prove_update(parts, before, hash_tensors(weights, names))
            save_stage_model(
                self.model, weights, self.processor, folder / "model", self.facts(name)
            )
            write_json(folder / "result.json", {**result, "update_proof": proof})
            return {**result, "update_proof": proof}

        result = on_main(finish)
        logger.info(
            "%s: held-out loss %.4f, with shuffled images %.4f (%+.4f)",
            *(name, loss, shuffled, shuffled - loss),
        )
        return result

    def _with_same_features(self, name: str) -> list[str]:
        """Name this stage and those right after it while no image's features change."""
        names = list(self.stages)
        return list(
            takewhile(
                lambda other: other in self._frozen and self.data[other] is self.data[name],
                names[names.index(name) :],
            )
        )

    def _remember_start(self, folder: Path, names: list[str]) -> dict[str, str]:
        """Hashes of the stage's first weights, for the proof of what moved."""
        folder.mkdir(exist_ok=True)
        before = read_json(folder / "before.json")
        if before is None:
            before = hash_tensors(dict(self.model.named_parameters()), names)
            write_json(folder / "before.json", before)
        return before
