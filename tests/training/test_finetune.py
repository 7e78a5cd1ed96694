"""Fine-tuning: what trains, what comes out, and that an interrupted run is an undisturbed one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hive_vision.folders import check_folder
from hive_vision.models.backbones import load_vision_model
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.finetune import FinetuneJob, finetune
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import apply_rules
from hive_vision.training.watchdog import Watchdog

Recipe = Any


def weights(arguments: Any, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(arguments.output) / folder / "model.safetensors")


def job_of(arguments: Any) -> FinetuneJob:
    watchdog = Watchdog(Path(arguments.output), 0, 1, stall_seconds=0)
    return FinetuneJob(
        arguments, RunFolder(arguments), watchdog, InterruptCallback(grace_seconds=60)
    )


class TestRun:
    def test_connector_then_language_model(self, vlm_recipe: Recipe) -> None:
        arguments = vlm_recipe()
        results = finetune(arguments)
        first, second = (stage["update_proof"] for stage in results["stages"])
        assert first["projectors"]["moved"] == 4
        assert first["language_model"]["moved"] == first["vision_model"]["moved"] == 0
        assert second["projectors"]["moved"] == second["vision_model"]["moved"] == 0
        assert second["language_model"]["moved"] > 0
        assert results["conversations"] == {"stage1": 19, "stage2": 19}
        assert results["bad_samples"] == {"stage1": 0, "stage2": 0}
        assert json.loads((Path(arguments.output) / "results.json").read_text()) == results

    def test_leaves_a_stock_model_with_the_encoder_inside(self, vlm_recipe: Recipe) -> None:
        arguments = vlm_recipe()
        results = finetune(arguments)
        check_folder(Path(results["model"]), "vlm")
        model = AutoModelForImageTextToText.from_pretrained(results["model"])
        AutoProcessor.from_pretrained(results["model"])
        encoder = load_vision_model(arguments.model.vision).state_dict()
        inside = model.model.vision_tower.state_dict()
        assert all(torch.equal(weight, inside[name]) for name, weight in encoder.items())

    def test_the_connector_may_train_on(self, vlm_recipe: Recipe) -> None:
        arguments = vlm_recipe(train_connector=True, stage1={"max_steps": 0})
        assert arguments.stages["stage2"].rules["projectors"] == 1e-2
        proof = finetune(arguments)["stages"][0]["update_proof"]
        assert proof["projectors"]["moved"] == 4

    @pytest.mark.parametrize("where", [("stage1", 1), ("stage2", 1)])
    def test_stopped_and_continued_is_undisturbed(
        self, vlm_recipe: Recipe, where: tuple[str, int], tmp_path: Path
    ) -> None:
        undisturbed = vlm_recipe(output=str(tmp_path / "a"))
        stopped = vlm_recipe(output=str(tmp_path / "b"))
        finetune(undisturbed)
        with pytest.raises(InterruptedRunError):
            finetune(stopped, where)
        finetune(stopped)
        for folder in ("stage1/model", "stage2/model", "model"):
            one, other = weights(undisturbed, folder), weights(stopped, folder)
            assert all(torch.equal(weight, other[name]) for name, weight in one.items())

    def test_learns_the_answers(self, vlm_recipe: Recipe) -> None:
        quick = {"max_steps": 30, "batch_size": 8}
        results = finetune(vlm_recipe(stage1={"max_steps": 2}, stage2=quick))
        first, second = (stage["held_out_loss"] for stage in results["stages"])
        assert second < first / 3

    def test_finished_runs_are_not_run_again(self, vlm_recipe: Recipe) -> None:
        arguments = vlm_recipe()
        first = finetune(arguments)
        before = (Path(arguments.output) / "model" / "model.safetensors").stat().st_mtime_ns
        assert finetune(arguments) == first
        after = (Path(arguments.output) / "model" / "model.safetensors").stat().st_mtime_ns
        assert after == before

    def test_another_recipe_in_its_folder(self, vlm_recipe: Recipe) -> None:
        finetune(vlm_recipe())
        with pytest.raises(ValueError, match=r"run of another recipe .*train_connector"):
            finetune(vlm_recipe(train_connector=True))


class TestTextOnly:
    """Batches without an image: nothing learns from the blank one that stands in."""

    @pytest.fixture
    def text_only(self, tmp_path: Path) -> str:
        turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "a red square"}]
        path = tmp_path / "text.json"
        path.write_text(json.dumps([{"conversations": turns}] * 40))
        return str(path)

    def test_a_stage_of_it(self, vlm_recipe: Recipe, text_only: str) -> None:
        arguments = vlm_recipe(data={"train": text_only}, stage1={"max_steps": 0})
        assert finetune(arguments)["stages"][0]["held_out_loss"] > 0

    def test_the_connector_has_a_gradient_of_zero(self, vlm_recipe: Recipe, text_only: str) -> None:
        """Which distributed training waits for; and the loss is that of the text alone."""
        arguments = vlm_recipe(data={"train": text_only})
        job = job_of(arguments)
        apply_rules(job.model, arguments.stages["stage1"].rules)
        data = job.data["stage1"].train
        batch = job.collator(job.model)([data[0], data[1]])
        inputs = {k: v for k, v in batch.items() if k not in ("sample_ids", "bad_samples")}
        inputs = job.pixels.normalize(inputs)
        loss = job.model(**inputs).loss
        loss.backward()
        for parameter in job.model.model.multi_modal_projector.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() == 0
        width = len(data[0]["input_ids"])
        text = {name: inputs[name][:, :width] for name in ("input_ids", "attention_mask", "labels")}
        torch.testing.assert_close(job.model(**text).loss, loss)


class TestRefusals:
    def test_too_much_to_learn_nothing_from(self, vlm_recipe: Recipe, tmp_path: Path) -> None:
        good = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "a square"}]
        samples = [{"conversations": good}] * 38 + [{"conversations": good[:1]}] * 2
        path = tmp_path / "half.json"
        path.write_text(json.dumps(samples))
        data = {"train": str(path), "holdout": 0.02}
        with pytest.raises(ValueError, match=r"have nothing to learn from .*no answer to learn"):
            finetune(vlm_recipe(data=data))
        assert not (tmp_path / "vlm").exists()
        allowed = {**data, "max_unlearned_fraction": 0.1, "max_bad_fraction": 0.1}
        finetune(vlm_recipe(data=allowed, stage1={"max_steps": 0}))

    def test_everything_is_cut(self, vlm_recipe: Recipe) -> None:
        with pytest.raises(ValueError, match="no answer within 3 tokens"):
            finetune(vlm_recipe(data={"max_tokens": 3}))

    def test_no_template(self, vlm_recipe: Recipe) -> None:
        arguments = vlm_recipe()
        bare = replace(arguments, model=replace(arguments.model, chat_template=None))
        with pytest.raises(ValueError, match="has no chat template; give chat_template=llava"):
            finetune(bare)
        missing = replace(arguments, model=replace(arguments.model, chat_template="nothing.jinja"))
        with pytest.raises(ValueError, match=r"'nothing\.jinja'; give llava or a jinja file"):
            finetune(missing)

    def test_a_template_in_a_file(self, vlm_recipe: Recipe, tmp_path: Path) -> None:
        path = tmp_path / "own.jinja"
        path.write_text(
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
        )
        arguments = vlm_recipe()
        arguments.model.chat_template = str(path)
        results = finetune(arguments)
        processor = AutoProcessor.from_pretrained(results["model"])
        text = processor.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True
        )
        assert text == "user: hello</s>assistant:"

    def test_numbers(self) -> None:
        from hive_vision.training.arguments import InstructionArguments

        for options, message in (
            ({"max_tokens": 0}, "max_tokens is 0"),
            ({"max_bad_fraction": 2}, "max_bad_fraction is 2"),
            ({"num_workers": -1}, "num_workers is -1"),
        ):
            with pytest.raises(ValueError, match=message):
                InstructionArguments("x", **options)
        with pytest.raises(ValueError, match="an empty list"):
            InstructionArguments([]).train_sources()
