import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer, TrainingArguments, set_seed

from hive_vision.data.sampler import OrderedPart
from hive_vision.training.arguments import FaultArguments
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.checkpoints import checkpoint_folder
from hive_vision.training.errors import TrainingError
from hive_vision.training.pretrain import PretrainJob
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import apply_rules
from hive_vision.training.trainer import learning_rate_factor
from hive_vision.training.watchdog import Watchdog
from tests.training.conftest import stage


def make_trainer(arguments, number=3):
    """A trainer for one stage of a recipe, and the job around it."""
    run = RunFolder(arguments)
    watchdog = Watchdog(run.path, 0, 1, stall_seconds=0)
    job = PretrainJob(arguments, run, watchdog, InterruptCallback(grace_seconds=60))
    run.create()
    run.stage("stage1").mkdir(exist_ok=True)
    settings = list(arguments.stages.values())[number - 1]
    parts = apply_rules(job.model, settings.rules)
    return job, job.trainer("stage1", settings, parts)


@pytest.mark.parametrize(("total", "warmup"), [(2326, 70), (4652, 140), (581, 18)])
def test_warmup_of_table_3(tmp_path, total, warmup):
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=0.03)
    assert arguments.get_warmup_steps(total) == warmup


@given(st.integers(1, 300), st.floats(0, 0.5), st.floats(0, 1))
def test_schedule_rises_to_the_peak_and_falls_to_the_minimum(total, share, minimum):
    warmup = math.ceil(share * total)
    factors = [learning_rate_factor(step, warmup, total, minimum) for step in range(total)]
    assert factors[0] > 0 or minimum == 0
    assert all(minimum - 1e-9 <= f <= 1 + 1e-9 for f in factors[warmup:])
    assert factors[: max(0, warmup - 1)] == sorted(factors[: max(0, warmup - 1)])
    if warmup:
        assert factors[warmup - 1] == 1
    if total > warmup:
        assert factors[-1] == pytest.approx(minimum)
        assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_every_group_has_its_rate_and_decays_to_its_own_minimum(recipe):
    rules = {"projectors": 1e-2, "cross_attentions": 4e-3, "language_model": 2e-3}
    settings = stage(3, rules={**rules, "vision_model": 1e-3}, max_steps=5, min_learning_rate=0.1)
    _, trainer = make_trainer(recipe(stage3=settings))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 5
    for group, peak in rules.items():
        rates = [line[f"learning_rate/{group}"] for line in lines]
        assert max(rates) <= peak
        assert all(line[f"grad_norm/{group}"] > 0 for line in lines[1:]), group
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    optimizer_rates = {name: group["lr"] for name, group in groups.items()}
    assert optimizer_rates["projectors"] == pytest.approx(1e-3)
    assert optimizer_rates["vision_model"] == pytest.approx(1e-4)


def test_group_norms_make_up_the_total_norm_before_clipping(recipe):
    settings = stage(3, max_steps=3, max_grad_norm=1e-3)
    _, trainer = make_trainer(recipe(stage3=settings))
    trainer.train()
    for line in trainer.state.log_history[:3]:
        norms = [value for key, value in line.items() if key.startswith("grad_norm/")]
        assert math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-4)


def test_accumulation_changes_nothing(recipe, tmp_path):
    weights = []
    for micro in (4, 2, 1):
        arguments = recipe(micro_batch_size=micro, output=str(tmp_path / str(micro)))
        job, trainer = make_trainer(arguments)
        assert trainer.args.gradient_accumulation_steps == 4 // micro
        trainer.train()
        weights.append(job.model.state_dict())
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=2e-4, msg=name)


def test_held_out_loss_is_the_mean_over_tokens(recipe):
    job, trainer = make_trainer(recipe(micro_batch_size=3))
    torch.nn.init.normal_(job.model.cross_attentions[0].o_proj.weight)
    batch = job.collator(job.model)(
        [job.data["stage1"].held_out[i] for i in range(len(job.data["stage1"].held_out))]
    )
    inputs = {k: v for k, v in batch.items() if k not in ("sample_ids", "bad_samples")}
    inputs = job.pixels.normalize(inputs)
    job.model.eval()
    with torch.no_grad():
        expected = job.model(**inputs).loss.item()
        inputs.pop("pixel_values")
        alone = job.model.language_model(**inputs).loss.item()
    assert trainer.held_out_loss() == pytest.approx(expected, rel=1e-5)
    assert trainer.held_out_loss("none") == pytest.approx(alone, rel=1e-5)
    assert trainer.held_out_loss("shuffled") != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_workers_give_bytes_and_nothing_else_changes(recipe, tmp_path, method):
    weights, losses = [], []
    for is_split in (True, False):
        arguments = recipe(
            method=method, output=str(tmp_path / str(is_split)), data={"num_workers": 2}
        )
        job, trainer = make_trainer(arguments)
        assert job.pixels.is_split
        job.pixels.is_split = is_split
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["pixel_values"].dtype == (torch.uint8 if is_split else torch.float32)
        trainer.train()
        weights.append(job.model.state_dict())
        losses.append([trainer.held_out_loss(), trainer.held_out_loss("shuffled")])
    assert losses[0] == losses[1]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_workers_have_seeds_of_their_own(recipe, tmp_path):
    """transformers' seeds are in effect: all three generators follow the worker's seed."""

    def draws(seed, output):
        arguments = recipe(
            seed=seed, output=str(tmp_path / output), data={"num_workers": 2}, micro_batch_size=2
        )
        _, trainer = make_trainer(arguments)
        trainer.data_collator = draw_numbers
        set_seed(seed)  # as `train` does
        return [batch["drawn"] for batch in trainer.get_train_dataloader()]

    first, second, *_ = drawn = draws(1, "first")
    for seed, *numbers in (first, second):
        assert numbers == [
            random.Random(seed).random(),
            np.random.RandomState(seed).random(),
            torch.rand((), generator=torch.Generator().manual_seed(seed)).item(),
        ]
    assert first[0] != second[0]
    assert drawn == draws(1, "again")
    assert drawn != draws(2, "other")


def draw_numbers(samples):
    numbers = [random.random(), np.random.random(), torch.rand(()).item()]
    return {"drawn": [torch.initial_seed(), *numbers]}


@pytest.mark.parametrize("method", ["hive", "cascaded", "sa"])
def test_two_samples_overfit_and_images_matter(recipe, method):
    """Same two captions each step: only the image says which one it is."""
    settings = stage(3, max_steps=150, batch_size=2, warmup=0.1, min_learning_rate=0.1)
    job, trainer = make_trainer(recipe(method=method, stage3=settings, log_every=20))
    two = torch.utils.data.Subset(job.data["stage1"].train, [0, 1])
    two.lengths = job.data["stage1"].train.lengths[:2]
    two.parts = [OrderedPart(2)]
    two.with_images_of = job.data["stage1"].train.with_images_of
    trainer.train_dataset = trainer.eval_dataset = two
    trainer.train()
    assert trainer.held_out_loss() < 0.05
    assert trainer.held_out_loss("shuffled") > 0.5


def test_two_methods_see_the_same_batches_and_supervise_the_same_tokens(recipe, tmp_path):
    seen = {}
    for method in ("hive", "cascaded", "sa"):
        arguments = recipe(method=method, output=str(tmp_path / method))
        _, trainer = make_trainer(arguments)
        loader = trainer.get_train_dataloader()
        seen[method] = [
            (b["sample_ids"], [row[row != -100].tolist() for row in b["labels"]], b["pixel_values"])
            for b in loader
        ]
    for method in ("cascaded", "sa"):
        for (ids, tokens, pixels), other in zip(seen["hive"], seen[method], strict=True):
            assert ids == other[0]
            assert tokens == other[1]
            assert torch.equal(pixels, other[2])


def test_loss_that_is_not_finite_names_the_samples(recipe):
    job, trainer = make_trainer(recipe())
    with torch.no_grad():
        job.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"is nan at step 1; .*divergence.jsonl"):
        trainer.train()
    saved = json.loads((job.run.stage("stage1") / "divergence.jsonl").read_text())
    assert saved["step"] == 1
    assert len(saved["sample_ids"]) == 4


@pytest.mark.parametrize(
    ("vision", "language", "options"),
    [("vit", "neox", {"cross_attention_start": "random"}), ("clip", "llama", {})],
)
def test_checkpoints_load_strictly_under_older_key_names(recipe, vision, language, options):
    """ViT and GPT-NeoX are saved under older names, which a lenient load would skip."""
    settings = stage(3, max_steps=2)
    arguments = recipe(vision, language, stage3=settings, save_every=2, model=options)
    job, trainer = make_trainer(arguments)
    trainer.train()
    trained = {name: p.clone() for name, p in job.model.state_dict().items()}
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.zero_()
    trainer._load_from_checkpoint(str(checkpoint_folder(job.run.stage("stage1"), 2)))
    for name, weight in job.model.state_dict().items():
        assert torch.equal(weight, trained[name]), name


def test_weights_decay_but_biases_and_norms_do_not(recipe):
    job, trainer = make_trainer(recipe(stage3=stage(3, weight_decay=0.1)))
    optimizer = trainer.create_optimizer()
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    found = {name: decay[id(p)] for name, p in job.model.named_parameters() if id(p) in decay}
    one_dimensional = {n for n, p in job.model.named_parameters() if p.dim() < 2}
    assert {name for name, value in found.items() if value == 0} == one_dimensional & found.keys()
    assert set(found.values()) == {0.0, 0.1}


def test_guard_is_shown_the_loss_of_each_step_alone(recipe):
    """Of each step, not a sum over steps; spikes are told by it."""
    arguments = recipe(
        micro_batch_size=2, stage3=stage(3, max_steps=4), faults=FaultArguments(loss_spike=100.0)
    )
    _, trainer = make_trainer(arguments)
    shown = []
    trainer.guard.judge = lambda step, loss, norm, ids: shown.append(loss) or True
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert shown == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left"),
        CheckpointException("failed", {0: (OSError("No space left"), None)}),
    ],
)
def test_checkpoint_that_cannot_be_written_is_one_line(recipe, monkeypatch, error):
    """Sharded ones fail with an exception that is none of Python's usual ones."""
    _, trainer = make_trainer(recipe())

    def fail(self, model, trial):
        raise error

    monkeypatch.setattr(Trainer, "_save_checkpoint", fail)
    with pytest.raises(TrainingError, match=r"could not be written \(No space left\); last good"):
        trainer._save_checkpoint(trainer.model, None)
