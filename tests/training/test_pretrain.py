import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, LlavaForConditionalGeneration

from hive_vision.data.collators import CaptionCollator
from hive_vision.folders import check_folder
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.training.arguments import FaultArguments
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.divergence import DivergenceGuard
from hive_vision.training.errors import InterruptedRunError, TrainingError
from hive_vision.training.pretrain import PretrainJob, pretrain
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.watchdog import Watchdog
from tests.conftest import VOCABULARY, make_tokenizer, text_config
from tests.training.conftest import FROZEN, stage


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stage3" / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def lines_of() -> object:
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["hive", "cascaded", "sa", "base"])
def test_run_leaves_a_plain_encoder_and_a_summary(recipe, method, tmp_path, lines_of):
    results = pretrain(recipe(method=method))
    run = tmp_path / "run"
    assert results == json.loads((run / "results.json").read_text())
    encoder = AutoModel.from_pretrained(run / "encoder").eval()
    processor = AutoImageProcessor.from_pretrained(run / "encoder")
    assert "library_name: transformers" in (run / "encoder" / "README.md").read_text()
    pixels = torch.randn(1, 3, processor.size["height"], processor.size["width"])
    features = encoder(pixels).last_hidden_state
    source = AutoModel.from_pretrained(results_source(recipe)).eval()
    unchanged = torch.equal(features, source(pixels).last_hidden_state)
    assert unchanged == (method == "base")
    if method == "base":
        assert results["stages"] == []
        assert results["trained_parameters"] == 0
        return
    assert [s["name"] for s in results["stages"]] == ["stage1", "stage2", "stage3"]
    assert results["held_out_loss_shuffled_images"] != results["held_out_loss"]
    assert results["peak_memory_bytes"] > 0
    proof = results["stages"][0]["update_proof"]
    assert proof["vision_model"]["moved"] == 0
    assert proof["projectors"]["moved"] > 0
    metrics = lines_of(run / "metrics.jsonl")
    assert {line["stage"] for line in metrics} == {"stage1", "stage2", "stage3"}
    assert any("grad_norm/projectors" in line for line in metrics)
    if method == "sa":
        model = LlavaForConditionalGeneration.from_pretrained(run / "stage3" / "model").eval()
        trained = model.model.vision_tower
    else:
        model = HiveForConditionalGeneration.from_pretrained(run / "stage3" / "model").eval()
        assert HiveProcessor.from_pretrained(run / "stage3" / "model").max_text_tokens == 77
        trained = model.vision_model
    assert torch.equal(trained(pixels).last_hidden_state, features)


def results_source(recipe) -> str:
    return recipe().model.vision


def test_same_recipe_and_seed_give_the_same_weights(recipe, tmp_path):
    for name in ("a", "b"):
        pretrain(recipe(output=str(tmp_path / name)))
    pretrain(recipe(output=str(tmp_path / "c"), seed=1))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_finished_run_does_nothing(recipe, tmp_path, caplog):
    first = pretrain(recipe())
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}
    with caplog.at_level("INFO", logger="hive_vision"):
        assert pretrain(recipe()) == first
    assert "already finished; nothing to do" in caplog.text
    assert times == {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize(("method", "stage_name"), [("hive", "stage1"), ("sa", "stage3")])
def test_ctrl_c_saves_and_the_same_call_goes_on(recipe, tmp_path, method, stage_name):
    """Interrupted in the middle of a stage and continued: the same weights, bit for bit."""
    stages = {f"stage{n}": stage(n, max_steps=30) for n in (1, 2, 3)}
    options = {"method": method, "evaluate_every": 7, **stages}
    run = tmp_path / "stopped"

    def press_ctrl_c() -> None:
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if metrics.exists() and f'"{stage_name}", "step": 3' in metrics.read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=press_ctrl_c)
    watcher.start()
    with pytest.raises(InterruptedRunError, match=f"{stage_name} stopped after step"):
        pretrain(recipe(output=str(run), **options))
    watcher.join()
    assert list((run / stage_name).glob("checkpoint-*"))
    pretrain(recipe(output=str(run), **options))
    pretrain(recipe(output=str(tmp_path / "undisturbed"), **options))
    assert_same_weights(run, tmp_path / "undisturbed")


def test_stage_without_steps_is_left_out(recipe):
    results = pretrain(recipe(stage1=stage(1), stage2=stage(2, max_steps=0)))
    assert [s["name"] for s in results["stages"]] == ["stage1", "stage3"]


def test_gradient_checkpointing_gives_the_same_weights(recipe, tmp_path):
    for name, checkpointing in (("a", False), ("b", True)):
        pretrain(recipe(output=str(tmp_path / name), gradient_checkpointing=checkpointing))
    for name, weight in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], weight, rtol=1e-4, atol=1e-5)


def test_unusable_samples_are_replaced_named_and_counted(recipe, image_folder, tmp_path, lines_of):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "003.png").write_bytes(b"not an image")
    stages = {f"stage{n}": stage(n, max_steps=8) for n in (1, 2, 3)}
    data = {"train": str(folder), "validation": str(image_folder)}
    results = pretrain(recipe(data={**data, "max_bad_fraction": 0.1}, **stages))
    assert results["bad_samples"] == 1
    (bad,) = lines_of(tmp_path / "run" / "bad_samples.jsonl")
    assert bad["sample_id"] == 3
    assert bad["source"].endswith("003.png")
    strict = recipe(data={**data, "max_bad_fraction": 0}, output=str(tmp_path / "strict"), **stages)
    with pytest.raises(TrainingError, match="1 samples cannot be used, 0 are allowed"):
        pretrain(strict)


def shallow_language_model(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(text_config("llama", layers=1)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def foreign_tokenizer(folder: Path, original: Path) -> Path:
    shutil.copytree(original, folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<more{i}>" for i in range(30)])
    assert len(tokenizer) > VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder


def test_bad_input_is_one_line_and_leaves_no_folder(recipe, backbone_folders, tmp_path):
    (tmp_path / "no_config").mkdir()
    (tmp_path / "empty").mkdir()
    shallow = shallow_language_model(tmp_path / "shallow")
    foreign = foreign_tokenizer(tmp_path / "foreign", backbone_folders["llama"])
    cases = {
        "has no config.json": {"model": {"vision": str(tmp_path / "no_config")}},
        "language model has only 1": {"model": {"language": str(shallow)}},
        "layers 1 to 8": {"model": {"layer_selection": [4, 9]}},
        "330 tokens but the embedding has 300": {"model": {"language": str(foreign)}},
        "its columns are image, caption": {"data": {"caption_column": "text"}},
        "no images found": {"data": {"train": str(tmp_path / "empty")}},
        "no rule covers": {"stage2": stage(2, rules={"projectors": 1e-3})},
        "zero output or gate": {
            "stage1": stage(1, rules={"projectors": 1e-3, "cross_attentions": "frozen", **FROZEN})
        },
        "stage1: max_steps is None and epochs is None": {"stage1": stage(1, max_steps=None)},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            pretrain(recipe(**options))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists(), message


@pytest.fixture
def poison(monkeypatch):
    """The samples of one batch, whose images become NaN; fill the list."""

    bad: list[int] = []
    collate = CaptionCollator.__call__

    def poisoned(self, samples):
        batch = collate(self, samples)
        if batch["sample_ids"] == bad:
            batch["pixel_values"] = batch["pixel_values"] * torch.nan
        return batch

    monkeypatch.setattr(CaptionCollator, "__call__", poisoned)
    return bad


def sample_ids_of(arguments, step: int) -> list[int]:
    """The samples of a step, counted from 1, of the first stage."""
    watchdog = Watchdog(Path(arguments.output), 0, 1, stall_seconds=0)
    job = PretrainJob(
        arguments, RunFolder(arguments), watchdog, InterruptCallback(grace_seconds=60)
    )
    loader = job.trainer("stage1", arguments.stage1, []).get_train_dataloader()
    return next(b["sample_ids"] for n, b in enumerate(loader, start=1) if n == step)


def run_poisoned(recipe, tmp_path, poison, action: str, step: int):
    settings = stage(1, max_steps=8)
    arguments = recipe(
        stage1=settings,
        stage2=stage(2, max_steps=0),
        stage3=stage(3, max_steps=0),
        output=str(tmp_path / action),
        save_every=2,
        faults=FaultArguments(on_divergence=action, max_events=1),
    )
    poison[:] = sample_ids_of(dataclasses.replace(arguments, output=str(tmp_path / "order")), step)
    pretrain(arguments)
    lines = (tmp_path / action / "metrics.jsonl").read_text().splitlines()
    model = HiveForConditionalGeneration.from_pretrained(tmp_path / action / "stage1" / "model")
    return [json.loads(line) for line in lines], model.state_dict()


def test_skipped_step_changes_nothing_and_is_named(recipe, tmp_path, poison):
    metrics, weights = run_poisoned(recipe, tmp_path, poison, "skip", step=5)
    assert all(weight.isfinite().all() for weight in weights.values())
    (event,) = (tmp_path / "skip" / "stage1" / "divergence.jsonl").read_text().splitlines()
    assert json.loads(event)["step"] == 5
    assert json.loads(event)["sample_ids"] == poison
    norms = {line["step"]: line["grad_norm"] for line in metrics if "grad_norm" in line}
    assert sorted(norms) == list(range(1, 9)), "every step is logged, and once"
    assert [step for step, norm in norms.items() if norm != norm] == [5]


def test_rollback_goes_on_from_the_last_good_checkpoint_without_that_data(recipe, tmp_path, poison):
    """At step 5, right after a checkpoint, it is the same as leaving that step out."""
    _, skipped = run_poisoned(recipe, tmp_path, poison, "skip", step=5)
    metrics, rolled_back = run_poisoned(recipe, tmp_path, poison, "rollback", step=5)
    for name, weight in skipped.items():
        assert torch.equal(rolled_back[name], weight), name
    saved = json.loads((tmp_path / "rollback" / "stage1" / "skipped_steps.json").read_text())
    assert saved == {"steps": [5], "rollbacks": 1}
    steps = [line["step"] for line in metrics if "loss" in line]
    assert steps == list(range(1, 9))


def test_rollback_past_several_steps_leaves_all_their_data_out(recipe, tmp_path, poison):
    run_poisoned(recipe, tmp_path, poison, "rollback", step=4)
    saved = json.loads((tmp_path / "rollback" / "stage1" / "skipped_steps.json").read_text())
    assert saved["steps"] == [3, 4], "the checkpoint before it is that of step 2"


def test_padding_is_logged(recipe, tmp_path, lines_of):
    pretrain(recipe())
    shares = [line["padding"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[:2]]
    assert all(0 <= share < 1 for share in shares)
    arguments = recipe(output=str(tmp_path / "other"))
    job = PretrainJob(
        arguments,
        RunFolder(arguments),
        Watchdog(tmp_path, 0, 1, stall_seconds=0),
        InterruptCallback(grace_seconds=60),
    )
    masks = [
        batch["attention_mask"].float()
        for batch in job.trainer("stage1", arguments.stage1, []).get_train_dataloader()
    ]
    assert shares == pytest.approx([1 - mask.mean().item() for mask in masks], abs=1e-6)


def test_other_data_is_refused_when_going_on(recipe, image_folder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    arguments = recipe(data={"train": str(folder)})
    with pytest.raises(InterruptedRunError):
        pretrain(arguments, stop_after=("stage2", 1))
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("circle", "square"))
    with pytest.raises(ValueError, match=r"captions with fingerprint .* restore the data") as error:
        pretrain(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", [("stage1", 1), ("stage2", 2), ("stage3", 1)])
def test_run_can_be_stopped_anywhere_for_a_proof(recipe, tmp_path, where):
    arguments = recipe(output=str(tmp_path / "stopped"))
    with pytest.raises(InterruptedRunError, match=f"{where[0]} stopped after step {where[1]}"):
        pretrain(arguments, stop_after=where)
    pretrain(arguments)
    pretrain(recipe(output=str(tmp_path / "undisturbed")))
    assert_same_weights(tmp_path / "stopped", tmp_path / "undisturbed")


def test_what_is_handed_on_says_what_it_is(recipe, tmp_path):
    pretrain(recipe())
    run = tmp_path / "run"
    for folder, kind in ((run / "stage1" / "model", "model"), (run / "encoder", "encoder")):
        manifest = check_folder(folder, kind)
        assert manifest["method"] == "hive"
        assert manifest["data"]["captions"] == 32
        assert "model.safetensors" in manifest["files"]
    (run / "results.json").unlink()
    with (run / "stage3" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    with pytest.raises(ValueError, match=r"model.safetensors has other bytes than were written"):
        pretrain(recipe())


def test_how_often_is_as_asked_now(recipe, tmp_path, lines_of):
    """Not as it was asked when the checkpoint was written."""
    with pytest.raises(InterruptedRunError):
        pretrain(recipe(stage1=stage(1, max_steps=8), log_every=4), stop_after=("stage1", 5))
    pretrain(recipe(stage1=stage(1, max_steps=8), log_every=1))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["stage"] == "stage1" and "loss" in line]
    assert steps == [4, 6, 7, 8]


def test_checkpoint_of_a_sharded_model_is_refused_by_one_process(recipe, tmp_path):
    with pytest.raises(InterruptedRunError):
        pretrain(recipe(), stop_after=("stage1", 1))
    path = tmp_path / "run" / "stage1" / "checkpoint-1" / "manifest.json"
    path.write_text(path.read_text().replace('"sharded": false', '"sharded": true'))
    with pytest.raises(ValueError, match="several processes with sharding=fsdp2, this start"):
        pretrain(recipe())


def test_guard_remembers_what_was_usual_when_it_goes_on(recipe, monkeypatch):
    with pytest.raises(InterruptedRunError):
        pretrain(recipe(), stop_after=("stage1", 1))
    known = {}
    judge = DivergenceGuard.judge

    def noting(self, step, *rest):
        known.setdefault(step, len(self.state()["norms"]))
        return judge(self, step, *rest)

    monkeypatch.setattr(DivergenceGuard, "judge", noting)
    pretrain(recipe())
    assert known[2] == 1
