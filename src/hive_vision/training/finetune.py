"""Fine-tuning a LLaVA-style model on an encoder (paper section 4.3, Table 5)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor, PreTrainedModel

from hive_vision.data.collators import InstructionCollator
from hive_vision.folders import write_json
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.models.vlm import VlmInputs, export_vlm, vlm_card
from hive_vision.training.arguments import FinetuneArguments, VlmArguments
from hive_vision.training.bad_samples import BadSampleLog
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.hardware import peak_memory
from hive_vision.training.job import Job, run_job
from hive_vision.training.miniature import ensure_vlm_data
from hive_vision.training.processes import on_main, on_main_apart
from hive_vision.training.run_data import RunData, load_instruction_data
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.watchdog import Watchdog


def finetune(
    arguments: FinetuneArguments, stop_after: tuple[str, int] | None = None
) -> dict[str, Any]:
    """Run a recipe: both stages, then the export. Finished parts are not done again.

    With ``torchrun`` or ``accelerate launch`` every process calls it.

    Args:
        arguments: The recipe.
        stop_after: Stop as Ctrl-C does after this stage and step, e.g. ``("stage2", 100)``.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: If the recipe, the models or the data do not fit together.
        InterruptedRunError: After Ctrl-C or SIGTERM; the same call goes on from the checkpoint.
    """

    def work(run: RunFolder, watchdog: Watchdog, interrupt: InterruptCallback) -> dict[str, Any]:
        if arguments.miniature is not None:
            on_main_apart(ensure_vlm_data, arguments.miniature)
        job = FinetuneJob(arguments, run, watchdog, interrupt)
        on_main(run.create)
        return job.finish(job.train_stages())

    return run_job(arguments, work, stop_after)


class FinetuneJob(Job[FinetuneArguments]):
    """An encoder, a language model and conversations in, a stock LLaVA model out."""

    model_class = SelfAttentionForConditionalGeneration

    def load_processor(self) -> LlavaProcessor:
        """Join image processor and tokenizer; the chat template is the exported one."""
        self.inputs = vlm_inputs(self.arguments.model)
        return self.inputs.processor

    def load_data(self) -> Mapping[str, RunData[Any]]:
        """Load the conversations of each stage."""
        data, inputs = self.arguments.data, self.inputs
        return {
            name: load_instruction_data(part, inputs.form, inputs.image_tokens)
            for name, part in (("stage1", data.stage1), ("stage2", data.stage2))
        }

    def open_bad_samples(self) -> Mapping[str, BadSampleLog]:
        """Open a log for each stage, whose data has numbers of its own."""
        shares = {
            "stage1": self.arguments.data.stage1.max_bad_fraction,
            "stage2": self.arguments.data.stage2.max_bad_fraction,
        }
        return {
            name: BadSampleLog(
                self.run.path / f"bad_samples-{name}.jsonl",
                allowed=math.ceil(share * len(self.data[name].train)),
            )
            for name, share in shares.items()
        }

    def first_model(self) -> PreTrainedModel:
        """Join encoder and language model the LLaVA way."""
        model = self.arguments.model
        return SelfAttentionForConditionalGeneration.from_backbones(
            model.vision,
            model.language,
            image_token_id=self.inputs.form.image_token_id,
            feature_layer=model.feature_layer,
        )

    def collator(self, model: PreTrainedModel) -> InstructionCollator:
        """Make what puts images and their tokens in place."""
        return InstructionCollator(
            self.pixels,
            self.processor.tokenizer.pad_token_id,
            self.inputs.form.image_token_id,
            self.inputs.image_tokens,
        )

    def describe(self) -> dict[str, Any]:
        """Backbones."""
        model = self.arguments.model
        return {"method": "vlm", "vision": model.vision, "language": model.language}

    def finish(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        """Export the model and write the summary."""
        model, folder = self.arguments.model, self.run.path / "model"
        results: dict[str, Any] = {
            "vision": model.vision,
            "language": model.language,
            "seed": self.arguments.seed,
            "conversations": {name: len(data.train) for name, data in self.data.items()},
            "cut": {name: data.train.cut for name, data in self.data.items()},
            "bad_samples": {name: len(log) for name, log in self.bad_samples.items()},
            "stages": stages,
        }
        self.renew_model()
        card = vlm_card(model.vision, model.language, _summary(results))
        facts = self.facts(list(self.data)[-1])
        on_main(lambda: export_vlm(self.model, self.inputs, folder, card, facts))
        results["model"] = str(folder)
        results["peak_memory_bytes"] = peak_memory()
        on_main(lambda: write_json(self.run.path / "results.json", results))
        return results


def vlm_inputs(model: VlmArguments) -> VlmInputs:
    """Load what prepares images and conversations for a recipe's model.

    Raises:
        ValueError: If something is missing, or cannot be used together.
    """
    return VlmInputs.from_backbones(model.vision, model.language, _template(model.chat_template))


def _template(given: str | None) -> str | None:
    """Read a chat template from its file.

    Raises:
        ValueError: If there is none.
    """
    if given is None or given == "llava":
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"model.chat_template is {given!r}; give llava or a jinja file ({error.strerror})"
        ) from error


def _summary(results: dict[str, Any]) -> str:
    lines = ["| stage | steps | held-out loss | with shuffled images |", "|---|---|---|---|"]
    lines += [
        f"| {s['name']} | {s['steps']} | {s['held_out_loss']:.4f} "
        f"| {s['held_out_loss_shuffled_images']:.4f} |"
        for s in results["stages"]
    ]
    return "\n".join(lines)
