"""Pre-training from recipe to encoder: the main job (paper sections 3.3 and 4.1)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from accelerate import PartialState
from transformers import PreTrainedModel

from hive_vision.data.collators import CaptionCollator
from hive_vision.folders import read_json, write_json
from hive_vision.models.backbones import backbones_of, load_config
from hive_vision.models.export import encoder_card, export_encoder
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor, check_image_size
from hive_vision.models.self_attention_baseline import (
    SelfAttentionForConditionalGeneration,
    image_token_id,
)
from hive_vision.training.arguments import PretrainArguments, StageArguments
from hive_vision.training.bad_samples import BadSampleLog
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.hardware import peak_memory
from hive_vision.training.job import Job, run_job
from hive_vision.training.miniature import ensure_miniature
from hive_vision.training.processes import on_main, on_main_apart
from hive_vision.training.run_data import RunData, load_run_data
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.watchdog import Watchdog

# Name of a stage, the encoder after it and its image processor -> what to keep of it, as JSON.
AfterStage: TypeAlias = Callable[[str, PreTrainedModel, Any], dict[str, Any]]
Guard: TypeAlias = Callable[[PretrainArguments], AfterStage]

NO_STAGE = "held_out"  # what belongs to the whole run


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

    def work(run: RunFolder, watchdog: Watchdog, interrupt: InterruptCallback) -> dict[str, Any]:
        if arguments.miniature is not None:
            on_main_apart(ensure_miniature, arguments.miniature)
        look = None
        if arguments.probe_after_stage:
            if guard is None:
                raise ValueError(
                    "the recipe has probe_after_stage, but pretrain() was called without a guard; "
                    "give guard=hive_vision.studies.regression_guard.RegressionGuard"
                )
            look = guard(arguments)
        job = PretrainJob(arguments, run, watchdog, interrupt, look)
        on_main(run.create)
        return job.finish(job.train_stages())

    return run_job(arguments, work, stop_after)


class PretrainJob(Job[PretrainArguments]):
    """Captions and an encoder in, a better encoder out.

    Args:
        arguments: The recipe.
        run: Its folder.
        watchdog: Is told what begins.
        interrupt: Knows when to stop.
        look: Looks at the encoder after each stage that trains it.
    """

    processor: HiveProcessor

    def __init__(
        self,
        arguments: PretrainArguments,
        run: RunFolder,
        watchdog: Watchdog,
        interrupt: InterruptCallback,
        look: AfterStage | None = None,
    ) -> None:
        self.look = look
        super().__init__(arguments, run, watchdog, interrupt)

    def load_processor(self) -> HiveProcessor:
        """Take the encoder's image processor and the language model's tokenizer."""
        model = self.arguments.model
        processor = HiveProcessor.from_backbones(
            model.vision, model.language, max_text_tokens=self.arguments.data.max_text_tokens
        )
        if self.arguments.method == "sa":
            config = load_config(model.vision, "vision")
            check_image_size(processor.image_processor, config, model.vision)
        return processor

    def load_data(self) -> Mapping[str, RunData[Any]]:
        """Load the captions, the same for all stages."""
        data = load_run_data(self.arguments.data, self.processor)
        return dict.fromkeys([*self.arguments.stages, NO_STAGE], data)

    def open_bad_samples(self) -> Mapping[str, BadSampleLog]:
        """Open the log, one for all stages."""
        share, captions = self.arguments.data.max_bad_fraction, len(self.data[NO_STAGE].train)
        log = BadSampleLog(self.run.bad_samples, allowed=math.ceil(share * captions))
        return dict.fromkeys(self.data, log)

    def checked_stages(self) -> dict[str, StageArguments]:
        """The stages that have steps to do; of the untouched encoder none."""
        return {} if self.arguments.method == "base" else super().checked_stages()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """LLaVA's, or ours."""
        sa = self.arguments.method == "sa"
        return SelfAttentionForConditionalGeneration if sa else HiveForConditionalGeneration

    def first_model(self) -> PreTrainedModel:
        """Join the backbones."""
        model, method = self.arguments.model, self.arguments.method
        backbones = (model.vision, model.language)
        if method == "sa":
            return SelfAttentionForConditionalGeneration.from_backbones(
                *backbones,
                image_token_id=image_token_id(self.processor.tokenizer),
                feature_layer=model.sa_feature_layer,
            )
        fusion = model.fusion_options(method)
        return HiveForConditionalGeneration.from_backbones(*backbones, **fusion)

    def collator(self, model: PreTrainedModel) -> CaptionCollator:
        """Make the collator; ``sa`` alone has placeholder tokens for the image."""
        tokenizer = self.processor.tokenizer
        image_tokens: tuple[int, ...] = ()
        if self.arguments.method == "sa":
            image_tokens = (image_token_id(tokenizer),) * model.config.image_seq_length
        return CaptionCollator(self.pixels, tokenizer.pad_token_id, image_tokens)

    def describe(self) -> dict[str, Any]:
        """Method and backbones."""
        model = self.arguments.model
        return {
            "method": self.arguments.method,
            "vision": model.vision,
            "language": model.language,
        }

    def after_stage(self, name: str, result: dict[str, Any]) -> None:
        """Have the encoder looked at if the stage trained it."""
        if self.look is not None and self.stages[name].rules.get("vision_model") != "frozen":
            result["probe"] = self._look_at_encoder(name, self.look)

    def _look_at_encoder(self, name: str, look: AfterStage) -> dict[str, Any]:
        """Hand the encoder of a finished stage to whoever wants to see it, once for its sets."""
        path, sets = self.run.stage(name) / "probe.json", self.arguments.probe_after_stage
        kept = on_main(lambda: read_json(path))
        if kept is None or kept["sets"] != sets:
            # Loading is agreed on by all processes, so it has no place inside on_main.
            vision, _ = backbones_of(self.load_model(self.run.stage(name) / "model"))

            def look_once() -> dict[str, Any]:
                found = look(name, vision, self.processor.image_processor)
                write_json(path, {"sets": sets, "found": found})
                return {"found": found}

            self.watchdog.pause(f"probing the encoder of {name}")
            kept = on_main(look_once)
        found: dict[str, Any] = kept["found"]
        return found

    def finish(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        """Export the encoder and write the summary."""
        arguments, data = self.arguments, self.data[NO_STAGE]
        results: dict[str, Any] = {
            "method": arguments.method,
            "seed": arguments.seed,
            "captions": len(data.train),
            "held_out_captions": len(data.held_out),
            "bad_samples": len(self.bad_samples[NO_STAGE]),
            "trained_parameters": max((s["trained_parameters"] for s in stages), default=0),
            "stages": stages,
        }
        if stages:
            for key in ("held_out_loss", "held_out_loss_shuffled_images"):
                results[key] = stages[-1][key]
        else:
            one = StageArguments(max_steps=1, batch_size=PartialState().num_processes)
            trainer = self.trainer(NO_STAGE, one, [])
            results["held_out_loss"] = trainer.held_out_loss("none")
        self.renew_model()
        vision, _ = backbones_of(self.model)
        card = encoder_card(arguments.model.vision, arguments.method, _summary(results))
        image_processor, facts = self.processor.image_processor, self.facts(NO_STAGE)
        on_main(lambda: export_encoder(vision, image_processor, self.run.encoder, card, facts))
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
