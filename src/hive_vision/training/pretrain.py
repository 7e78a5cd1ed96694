"""Pre-training from recipe to encoder: the main job (paper sections 3.3 and 4.1)."""

import gc
import logging
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import PartialState
from PIL import Image
from transformers import PreTrainedModel, PrinterCallback, set_seed

from hive_vision.data.collators import CaptionCollator
from hive_vision.folders import check_folder, read_json, read_manifest, write_json
from hive_vision.models.backbones import blank_image, hash_tensors, load_config
from hive_vision.models.export import encoder_card, export_encoder
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import (
    SelfAttentionForConditionalGeneration,
    image_token_id,
)
from hive_vision.training.arguments import PretrainArguments, StageArguments
from hive_vision.training.bad_samples import BadSampleLog
from hive_vision.training.callbacks import InterruptCallback, MetricsCallback, ProgressCallback
from hive_vision.training.checkpoints import (
    last_checkpoint,
    load_strictly,
    remove_checkpoints,
    save_stage_model,
    step_of,
)
from hive_vision.training.divergence import DivergenceGuard
from hive_vision.training.errors import InterruptedRunError, RollBackError, TrainingError
from hive_vision.training.foundations import ensure_miniature
from hive_vision.training.hardware import (
    is_sharded,
    peak_memory,
    split_batch,
    training_arguments,
)
from hive_vision.training.processes import on_main, on_main_apart, start_processes
from hive_vision.training.run_data import load_run_data
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import (
    apply_rules,
    backbones_of,
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

# Name of a stage, the encoder after it and its image processor -> what to keep of it, as JSON.
AfterStage: TypeAlias = Callable[[str, PreTrainedModel, Any], dict[str, Any]]
Guard: TypeAlias = Callable[[PretrainArguments], AfterStage]


def pretrain(
    arguments: PretrainArguments,
    stop_after: tuple[str, int] | None = None,
    guard: Guard | None = None,
) -> dict[str, Any]:
    """Run a recipe: all stages, then the export. Finished parts are not done again.

    With ``torchrun`` or ``accelerate launch`` every process calls it.

    Args:
        arguments: The recipe.
        stop_after: Stop as Ctrl-C does after this stage and step, e.g. ``("stage2", 100)``.
        guard: Makes what looks at the encoder after each stage that trains it, for recipes with
            ``probe_after_stage``: `studies.regression_guard.RegressionGuard`.

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
            return _pretrain(arguments, run, watchdog, interrupt, guard)
        except RuntimeError as error:
            # What a collective operation says when another process died does not name it.
            interrupt.is_ending = True
            lost = watchdog.lost_process(patience=5)
            if lost is None:
                raise
            raise TrainingError(f"{lost}; run the same command again to go on") from error


def _pretrain(
    arguments: PretrainArguments,
    run: RunFolder,
    watchdog: Watchdog,
    interrupt: InterruptCallback,
    guard: Guard | None,
) -> dict[str, Any]:
    if arguments.miniature is not None:
        on_main_apart(ensure_miniature, arguments.miniature)
    after_stage = None
    if arguments.probe_after_stage:
        if guard is None:
            raise ValueError(
                "the recipe has probe_after_stage, but pretrain() was called without a guard; "
                "give guard=hive_vision.studies.regression_guard.RegressionGuard"
            )
        after_stage = guard(arguments)
    job = Job(arguments, run, watchdog, interrupt)
    on_main(run.create)
    return job.finish([job.train_stage(name, after_stage) for name in job.stages])


class Job:
    """Everything that the stages share: data, processor, and the model they hand on."""

    def __init__(
        self,
        arguments: PretrainArguments,
        run: RunFolder,
        watchdog: Watchdog,
        interrupt: InterruptCallback,
    ) -> None:
        self.arguments = arguments
        self.run = run
        self.watchdog = watchdog
        self.interrupt = interrupt
        data, model = arguments.data, arguments.model
        self.processor = HiveProcessor.from_backbones(
            model.vision, model.language, max_text_tokens=data.max_text_tokens
        )
        if arguments.method == "sa":
            self._check_image_size(model.vision)
        self.data = load_run_data(data, self.processor)
        self.train_data, self.held_out = self.data.train, self.data.held_out
        self.bad_samples = BadSampleLog(
            run.bad_samples, allowed=math.ceil(data.max_bad_fraction * len(self.train_data))
        )
        self.stages = {} if arguments.method == "base" else self._checked_stages()
        finished = [name for name in self.stages if run.stage_result(name) is not None]
        self._handed_on = run.stage(finished[-1]) / "model" if finished else None
        self.model = self._load_model(self._handed_on)
        self._is_fresh = True
        # Found by tracing the encoder, which takes a while: once for all stages.
        self.groups = parameter_groups(self.model) if self.stages else {}
        for name in reversed(self.stages):
            apply_rules(self.model, self.stages[name].rules, self.groups)
        if self.stages and not finished:
            check_gradient_path(self.model)

    def _check_image_size(self, vision: str) -> None:
        """Refuse for sa what would give another number of image tokens than it has places."""
        config = load_config(vision, "vision")
        expected = blank_image(config).shape[-2:]
        image = Image.new("RGB", (expected[1], expected[0]))
        given = self.processor.image_processor(image, return_tensors="pt")["pixel_values"].shape
        if given[-2:] != expected:
            raise ValueError(
                f"the image processor of {vision!r} gives {tuple(given[-2:])} pixels but the "
                f"encoder is configured for {tuple(expected)}; method sa needs them to agree"
            )

    def _checked_stages(self) -> dict[str, StageArguments]:
        """The stages that have steps to do."""
        world_size = PartialState().num_processes
        chosen = {}
        for name, stage in self.arguments.stages.items():
            try:
                if stage.steps(self.data.samples) == 0:
                    continue
                split_batch(stage.batch_size, self.arguments.micro_batch_size, world_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            chosen[name] = stage
        return chosen

    def _renew_model(self) -> None:
        """Load the model again once it was trained.

        From its folder also when a stage finished a moment ago: a resumed run does the same.
        """
        if not self._is_fresh:
            del self.model
            gc.collect()
            self.model = self._load_model(self._handed_on)
        self._is_fresh = False

    def _load_model(self, folder: Path | None) -> PreTrainedModel:
        """Load the model that a finished stage handed on, or join the backbones."""
        arguments = self.arguments
        sa = arguments.method == "sa"
        model_class = SelfAttentionForConditionalGeneration if sa else HiveForConditionalGeneration
        if folder is not None:
            self._check_same_data(folder, on_main(lambda: check_folder(folder, "model")))
            return load_strictly(model_class, folder)
        set_seed(arguments.seed)
        backbones = (arguments.model.vision, arguments.model.language)
        if not sa:
            fusion = arguments.model.fusion_options(arguments.method)
            return model_class.from_backbones(*backbones, **fusion)
        return model_class.from_backbones(
            *backbones,
            image_token_id=image_token_id(self.processor.tokenizer),
            feature_layer=arguments.model.sa_feature_layer,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of every folder of this run says."""
        model = self.arguments.model
        return {
            "version": version("hive-vision"),
            "method": self.arguments.method,
            "vision": model.vision,
            "language": model.language,
            "data": {
                "fingerprint": self.data.fingerprint,
                "captions": len(self.train_data),
                "excluded": self.data.excluded,
            },
        }

    def _check_same_data(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Refuse to go on with other data than a checkpoint or stage was trained on."""
        saved, given = manifest["data"], self.facts["data"]
        if saved != given:
            raise ValueError(
                f"{folder} was trained on {saved['captions']} captions with fingerprint "
                f"{saved['fingerprint']}, but the data now has {given['captions']} with "
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

    def collator(self, model: PreTrainedModel) -> CaptionCollator:
        """Make the collator; ``sa`` alone has placeholder tokens for the image."""
        tokenizer = self.processor.tokenizer
        image_tokens: tuple[int, ...] = ()
        if self.arguments.method == "sa":
            image_tokens = (image_token_id(tokenizer),) * model.config.image_seq_length
        return CaptionCollator(self.processor.image_processor, tokenizer.pad_token_id, image_tokens)

    def trainer(self, name: str, stage: StageArguments, parts: Any, **kwargs: Any) -> HiveTrainer:
        """Set up a stage's trainer around the current model."""
        folder = self.run.stage(name)
        trainer = HiveTrainer(
            self.model,
            training_arguments(
                self.arguments,
                stage,
                folder,
                stage.steps(self.data.samples),
                sharded_classes(self.model),
            ),
            parts=parts,
            train_data=self.train_data,
            held_out=self.held_out,
            collator=self.collator(self.model),
            bad_samples=self.bad_samples,
            guard=DivergenceGuard(self.arguments.faults, folder),
            watchdog=self.watchdog,
            facts={**self.facts, "stage": name, "sharded": is_sharded(self.arguments)},
            min_learning_rate=stage.min_learning_rate,
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train_stage(self, name: str, after_stage: AfterStage | None = None) -> dict[str, Any]:
        """Train one stage, prove what moved, and leave its model in the run folder."""
        folder, stage = self.run.stage(name), self.stages[name]
        result = self.run.stage_result(name)
        if result is not None:
            logger.info("%s is already finished", name)
        else:
            steps = stage.steps(self.data.samples)
            logger.info("%s: %d steps of %d captions", name, steps, stage.batch_size)
        while result is None:
            try:
                result = self._train(name, stage, folder)
                self._handed_on = folder / "model"
            except RollBackError as rollback:
                self._roll_back(name, folder, rollback.step)
        on_main(lambda: remove_checkpoints(folder))
        if after_stage is not None and stage.rules.get("vision_model") != "frozen":
            result["probe"] = self._look_at_encoder(name, after_stage)
        return result

    def _look_at_encoder(self, name: str, after_stage: AfterStage) -> dict[str, Any]:
        """Hand the encoder of a finished stage to whoever wants to see it, once for its sets."""
        path, sets = self.run.stage(name) / "probe.json", self.arguments.probe_after_stage
        kept = on_main(lambda: read_json(path))
        if kept is None or kept["sets"] != sets:
            # Loading is agreed on by all processes, so it has no place inside on_main.
            vision, _ = backbones_of(self._load_model(self.run.stage(name) / "model"))

            def look() -> dict[str, Any]:
                found = after_stage(name, vision, self.processor.image_processor)
                write_json(path, {"sets": sets, "found": found})
                return {"found": found}

            self.watchdog.pause(f"probing the encoder of {name}")
            kept = on_main(look)
        found: dict[str, Any] = kept["found"]
        return found

    def _roll_back(self, name: str, folder: Path, step: int) -> None:
        checkpoint = on_main(lambda: last_checkpoint(folder))
        good = step_of(checkpoint) if checkpoint else 0
        DivergenceGuard(self.arguments.faults, folder).leave_out(good + 1, step)
        logger.warning("%s goes back to step %d, without the data up to step %d", name, good, step)

    def _train(self, name: str, stage: StageArguments, folder: Path) -> dict[str, Any]:
        """Go on from the stage's last good checkpoint, or start it."""
        self._renew_model()
        if self.arguments.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            # It lets what leaves the embeddings need gradients, those of a frozen encoder too.
            self.model.disable_input_require_grads()
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
        trainer = self.trainer(name, stage, parts, callbacks=[metrics, progress, self.interrupt])
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
            "steps": stage.steps(self.data.samples),
            "seconds_per_step": progress.seconds_per_step,
            "trained_parameters": sum(p.size for p in parts if p.learning_rate is not None),
            **losses,
        }

        def finish() -> dict[str, Any]:
            proof = prove_update(parts, before, hash_tensors(weights, names))
            facts = {**self.facts, "stage": name}
            save_stage_model(self.model, weights, self.processor, folder / "model", facts)
            write_json(folder / "result.json", {**result, "update_proof": proof})
            return {**result, "update_proof": proof}

        result = on_main(finish)
        logger.info(
            "%s: held-out loss %.4f, with shuffled images %.4f (%+.4f)",
            *(name, loss, shuffled, shuffled - loss),
        )
        return result

    def _remember_start(self, folder: Path, names: list[str]) -> dict[str, str]:
        """Hashes of the stage's first weights, for the proof of what moved."""
        folder.mkdir(exist_ok=True)
        before = read_json(folder / "before.json")
        if before is None:
            before = hash_tensors(dict(self.model.named_parameters()), names)
            write_json(folder / "before.json", before)
        return before

    def finish(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        """Export the encoder and write the summary."""
        arguments = self.arguments
        results: dict[str, Any] = {
            "method": arguments.method,
            "seed": arguments.seed,
            "captions": len(self.train_data),
            "held_out_captions": len(self.held_out),
            "bad_samples": len(self.bad_samples),
            "trained_parameters": max((s["trained_parameters"] for s in stages), default=0),
            "stages": stages,
        }
        if stages:
            for key in ("held_out_loss", "held_out_loss_shuffled_images"):
                results[key] = stages[-1][key]
        else:
            one = StageArguments(max_steps=1, batch_size=PartialState().num_processes)
            trainer = self.trainer("held_out", one, [])
            results["held_out_loss"] = trainer.held_out_loss("none")
        self._renew_model()
        vision, _ = backbones_of(self.model)
        card = encoder_card(arguments.model.vision, arguments.method, _summary(results))
        image_processor = self.processor.image_processor
        on_main(lambda: export_encoder(vision, image_processor, self.run.encoder, card, self.facts))
        results["encoder"] = str(self.run.encoder)
        results["peak_memory_bytes"] = peak_memory()
        on_main(lambda: write_json(self.run.path / "results.json", results))
        return results


def _summary(results: dict[str, Any]) -> str:
    lines = [f"Trained on {results['captions']:,} captioned images.", ""]
    lines += [
        "| stage | steps | held-out caption loss | with shuffled images |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {s['name']} | {s['steps']} | {s['held_out_loss']:.4f} "
        f"| {s['held_out_loss_shuffled_images']:.4f} |"
        for s in results["stages"]
    ]
    return "\n".join(lines)
