"""Pre-training from recipe to encoder: the main job (paper sections 3.3 and 4.1)."""

import logging
import math
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, set_seed

from hive_vision.data.collators import CaptionCollator
from hive_vision.folders import read_json, write_json
from hive_vision.models.backbones import blank_image, load_config
from hive_vision.models.export import encoder_card, export_encoder
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import (
    IMAGE_TOKEN,
    SelfAttentionForConditionalGeneration,
)
from hive_vision.training.arguments import PretrainArguments, StageArguments
from hive_vision.training.callbacks import InterruptCallback, MetricsCallback, ProgressCallback
from hive_vision.training.foundations import ensure_miniature
from hive_vision.training.run_data import load_run_data
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import (
    apply_rules,
    check_gradient_path,
    describe_parts,
    hash_parameters,
    prove_update,
)
from hive_vision.training.trainer import (
    BadSampleLog,
    HiveTrainer,
    TrainingError,
    last_checkpoint,
    split_batch,
)

logger = logging.getLogger(__name__)


class InterruptedRunError(RuntimeError):
    """The run was stopped by Ctrl-C after saving a checkpoint."""


def pretrain(arguments: PretrainArguments) -> dict[str, Any]:
    """Run a recipe: all stages, then the export. Finished parts are not done again.

    Args:
        arguments: The recipe.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: If the recipe, the models or the data do not fit together.
        InterruptedRunError: After Ctrl-C; the same call goes on from the checkpoint.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            f"started as {PartialState().num_processes} processes; this version trains in one"
        )
    run = RunFolder(arguments)
    if run.results is not None:
        logger.info("%s is already finished; nothing to do", run.path)
        return run.results
    if arguments.miniature is not None:
        ensure_miniature(arguments.miniature)
    job = Job(arguments, run)
    run.create()
    return job.finish([job.train_stage(name) for name in job.stages])


class Job:
    """Everything that the stages share: data, processor, and the model they hand on."""

    def __init__(self, arguments: PretrainArguments, run: RunFolder) -> None:
        self.arguments = arguments
        self.run = run
        data, model = arguments.data, arguments.model
        self.processor = HiveProcessor.from_backbones(
            model.vision, model.language, max_text_tokens=data.max_text_tokens
        )
        if arguments.method == "sa":
            self._check_image_size(model.vision)
        self.data = load_run_data(data, self.processor)
        self.train_data, self.held_out = self.data.train, self.data.held_out
        self.bad_samples = BadSampleLog(
            run.bad_samples, allowed=int(data.max_bad_fraction * len(self.train_data))
        )
        self.stages = {} if arguments.method == "base" else self._checked_stages()
        finished = [name for name in self.stages if run.stage_result(name) is not None]
        self.model = self._load_model(finished)
        if arguments.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for name in self.stages.keys() - finished:
            apply_rules(self.model, self.stages[name].rules)
        if self.stages and not finished:
            apply_rules(self.model, next(iter(self.stages.values())).rules)
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
                if stage.steps(len(self.train_data)) == 0:
                    continue
                split_batch(stage.batch_size, self.arguments.micro_batch_size, world_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            chosen[name] = stage
        return chosen

    def _load_model(self, finished: list[str]) -> PreTrainedModel:
        """Load the model that the last finished stage left, or join the backbones."""
        arguments = self.arguments
        folder = self.run.stage(finished[-1]) / "model" if finished else None
        sa = arguments.method == "sa"
        model_class = SelfAttentionForConditionalGeneration if sa else HiveForConditionalGeneration
        if folder is not None:
            return model_class.from_pretrained(folder, dtype=torch.float32)
        set_seed(arguments.seed)
        backbones = (arguments.model.vision, arguments.model.language)
        if not sa:
            fusion = arguments.model.fusion_options(arguments.method)
            return model_class.from_backbones(*backbones, **fusion)
        return model_class.from_backbones(
            *backbones,
            image_token_id=self.image_token_id,
            feature_layer=arguments.model.sa_feature_layer,
        )

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder; added to the tokenizer if it has none."""
        tokenizer = self.processor.tokenizer
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    def collator(self, model: PreTrainedModel) -> CaptionCollator:
        """Make the collator; ``sa`` alone has placeholder tokens for the image."""
        image_tokens: tuple[int, ...] = ()
        if self.arguments.method == "sa":
            image_tokens = (self.image_token_id,) * model.config.image_seq_length
        return CaptionCollator(
            self.processor.image_processor, self.processor.tokenizer.pad_token_id, image_tokens
        )

    def trainer(self, name: str, stage: StageArguments, parts: Any, **kwargs: Any) -> HiveTrainer:
        """Set up a stage's trainer around the current model."""
        trainer = HiveTrainer(
            self.model,
            training_arguments(
                self.arguments, stage, self.run.stage(name), stage.steps(len(self.train_data))
            ),
            parts=parts,
            train_data=self.train_data,
            held_out=self.held_out,
            collator=self.collator(self.model),
            bad_samples=self.bad_samples,
            min_learning_rate=stage.min_learning_rate,
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train_stage(self, name: str) -> dict[str, Any]:
        """Train one stage, prove what moved, and leave its model in the run folder."""
        finished = self.run.stage_result(name)
        if finished is not None:
            logger.info("%s is already finished", name)
            return finished
        folder, stage = self.run.stage(name), self.stages[name]
        parts = apply_rules(self.model, stage.rules)
        check_gradient_path(self.model)
        steps = stage.steps(len(self.train_data))
        logger.info("%s: %d steps of %d captions", name, steps, stage.batch_size)
        logger.info("%s", describe_parts(parts))
        folder.mkdir(exist_ok=True)
        before = read_json(folder / "before.json")
        if before is None:
            before = hash_parameters(self.model)
            write_json(folder / "before.json", before)
        progress, interrupt = ProgressCallback(name), InterruptCallback()
        trainer = self.trainer(
            name,
            stage,
            parts,
            callbacks=[MetricsCallback(self.run.metrics, name), progress, interrupt],
        )
        try:
            with interrupt:
                checkpoint = last_checkpoint(folder)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
        if interrupt.interrupted:
            raise InterruptedRunError(
                f"{name} stopped after step {trainer.state.global_step}, saved"
            )
        proof = prove_update(self.model, parts, before)
        loss, shuffled = trainer.held_out_loss(), trainer.held_out_loss("shuffled")
        if not math.isfinite(loss):
            raise TrainingError(f"{name} ended with a held-out loss of {loss}; lower its rates")
        result = {
            "name": name,
            "steps": steps,
            "seconds_per_step": progress.seconds_per_step,
            "trained_parameters": sum(p.size for p in parts if p.learning_rate is not None),
            "held_out_loss": loss,
            "held_out_loss_shuffled_images": shuffled,
            "update_proof": proof,
        }
        logger.info(
            "%s: held-out loss %.4f, with shuffled images %.4f (%+.4f)",
            *(name, loss, shuffled, shuffled - loss),
        )
        self.model.save_pretrained(folder / "model")
        self.processor.save_pretrained(folder / "model")
        write_json(folder / "result.json", result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return result

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
            trainer = self.trainer("held_out", StageArguments(max_steps=1), [])
            results["held_out_loss"] = trainer.held_out_loss("none")
        vision = (
            self.model.vision_model if arguments.method != "sa" else self.model.model.vision_tower
        )
        export_encoder(
            vision,
            self.processor.image_processor,
            self.run.encoder,
            encoder_card(arguments.model.vision, arguments.method, _summary(results)),
        )
        results["encoder"] = str(self.run.encoder)
        results["peak_memory_bytes"] = peak_memory()
        write_json(self.run.path / "results.json", results)
        return results


def training_arguments(
    arguments: PretrainArguments, stage: StageArguments, folder: Path, steps: int
) -> TrainingArguments:
    """Translate a stage of a recipe into transformers' arguments."""
    micro, accumulation = split_batch(
        stage.batch_size, arguments.micro_batch_size, PartialState().num_processes
    )
    precision = arguments.precision
    if precision == "auto":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if has_bfloat16 else "float32"
    return TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        seed=arguments.seed,
        data_seed=arguments.seed,
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=arguments.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        warmup_steps=stage.warmup,
        logging_steps=arguments.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if arguments.evaluate_every else "no",
        eval_steps=arguments.evaluate_every or None,
        save_strategy="steps",
        save_steps=arguments.save_every or steps,
        save_total_limit=2,
    )


def peak_memory() -> int:
    """Largest memory use of this process so far, in bytes: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
