"""The plan of a recipe: the paper's numbers, and what fits where."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hive_vision.studies.plan import make_plan
from hive_vision.studies.recipe_model import backbone_config, recipe_model
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.miniature import MiniatureSettings
from hive_vision.training.recipes import load_recipe
from hive_vision.training.stages import parameter_groups
from tests.training.conftest import recipe, stage

__all__ = ["recipe"]  # the fixture

Recipe = Callable[..., PretrainArguments]
PAPER = ("paper-clip-l14-336", "paper-siglip-l16-384", "siglip-l16-384-smollm2-360m")

# Linear layers, biases, norms and embeddings of the published shapes, written out.
BLOCK = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2 * 1024
CLIP = 24 * BLOCK + 14 * 14 * 3 * 1024 + 577 * 1024 + 1024 + 2 * 1024
SIGLIP = 24 * BLOCK + 16 * 16 * 3 * 1024 + 1024 + 576 * 1024
SIGLIP_TAIL = 2 * 1024 + 1024 + BLOCK - 2 * 1024  # last norm; a pooling block with one norm
ATTENTION = 2 * 960 * 960 + 2 * 960 * 320
LANGUAGE_BLOCKS = 32 * (ATTENTION + 3 * 960 * 2560 + 2 * 960) + 960
PROJECTOR = 2 * 1024 + (1024 * 960 + 960) + (960 * 960 + 960) + 1024 * 960
CROSS_ATTENTION = ATTENTION + 960


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_the_paper_recipes(name: str) -> None:
    model, _, _ = recipe_model(load_recipe(name))
    sizes: dict[str, int] = {}
    groups = parameter_groups(model)
    for parameter_name, parameter in model.named_parameters():
        group = groups[parameter_name]
        sizes[group] = sizes.get(group, 0) + parameter.numel()
    clip, smol = "clip" in name, "smol" in name
    assert sizes == {
        "vision_model": CLIP if clip else SIGLIP,
        "vision_tail": 2 * 1024 if clip else SIGLIP_TAIL,
        "projectors": 6 * PROJECTOR,
        "cross_attentions": 6 * CROSS_ATTENTION,
        "language_model": LANGUAGE_BLOCKS + (49152 if smol else 32000) * 960,
    }
    assert smol or sizes["language_model"] == 345_355_200
    expected = [4, 8, 12, 16, 20, 24] if clip else [19, 20, 21, 22, 23, 24]
    assert model.config.encoder_layers == expected


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_table_3(name: str) -> None:
    recipe = load_recipe(name)
    stages = list(recipe.stages.values())
    assert [s.max_steps for s in stages] == [2326, 4652, 581]
    assert [s.batch_size for s in stages] == [256, 256, 1024]
    assert [s.betas for s in stages] == [(0.9, 0.999), (0.9, 0.95), (0.9, 0.95)]
    assert [s.max_grad_norm for s in stages] == [1.0, 10.0, 10.0]
    assert [s.weight_decay for s in stages] == [0.0, 0.0, 0.0]
    peaks, lowest = [1e-3, 2e-5, 2e-6], [1e-4, 2e-6, 0.0]
    trained = [
        {"projectors", "cross_attentions"},
        {"projectors", "cross_attentions", "language_model"},
        {"projectors", "cross_attentions", "language_model", "vision_model"},
    ]
    for settings, peak, low, groups in zip(stages, peaks, lowest, trained, strict=True):
        rates = {group: rate for group, rate in settings.rules.items() if rate != "frozen"}
        assert rates == dict.fromkeys(groups, peak)
        assert settings.min_learning_rate * peak == pytest.approx(low)
    assert recipe.model.sa_feature_layer == -2
    assert recipe.data.max_text_tokens == 77


@pytest.fixture(scope="session")
def paper_plan() -> dict[str, Any]:
    return make_plan(load_recipe("paper-siglip-l16-384"), "H200", tokens=15)


def test_plan_of_the_paper_recipe(paper_plan: dict[str, Any]) -> None:
    stages = paper_plan["stages"]
    assert [s["steps"] for s in stages] == [2326, 4652, 581]
    assert [s["warmup_steps"] for s in stages] == [70, 140, 18]
    assert [s["micro_batch_size"] * s["accumulation"] for s in stages] == [256, 256, 1024]
    json.dumps(paper_plan)


def test_operations_agree_with_a_model_by_hand(paper_plan: dict[str, Any]) -> None:
    """GFLOP per caption that were worked out from formulas, layer by layer, for these shapes."""
    found = [stage["flops_per_caption"] / 1e9 for stage in paper_plan["stages"]]
    assert found == pytest.approx([469, 485, 1254], rel=0.03)
    hours = sum(
        stage["flops_per_caption"] * stage["steps"] * stage["batch_size"] / (989e12 * 0.4) / 3600
        for stage in paper_plan["stages"]
    )
    assert paper_plan["hours"] == pytest.approx(hours)


def test_largest_micro_batch_fits_and_no_larger_one(recipe: Recipe) -> None:
    arguments = recipe(stage3=stage(3, batch_size=256, max_steps=1))
    plan = make_plan(arguments, "cpu", tokens=8)
    (last,) = [s for s in plan["stages"] if s["name"] == "stage3"]
    assert last["memory"]["plain"]["largest_micro_batch"] == 256
    memory = last["memory"]["plain"]
    assert memory["at_largest"]["total"] > memory["at_micro_batch"]["total"]


def test_what_does_not_fit_says_how_many_devices(tmp_path: Path) -> None:
    overrides = ["stage1.max_steps=0", "stage2.max_steps=0"]
    arguments = load_recipe("paper-siglip-l16-384", [*overrides, f"model.vision={wide(tmp_path)}"])
    (alone,) = make_plan(arguments, "L4", tokens=16)["stages"]
    assert not alone["fits"]
    assert alone["memory"]["plain"]["largest_micro_batch"] is None
    needed = alone["devices_needed"]
    assert needed > 1
    arguments.sharding = "fsdp2"
    arguments.micro_batch_size = 1
    (together,) = make_plan(arguments, "L4", devices=needed, tokens=16)["stages"]
    assert together["fits"]
    assert together["hours"] == pytest.approx(alone["hours"] / needed)


def test_fewest_devices_may_be_any_divisor_of_the_batch(tmp_path: Path) -> None:
    overrides = ["stage1.max_steps=0", "stage2.max_steps=0", "stage3.batch_size=9"]
    overrides += ["micro_batch_size=1", f"model.vision={wide(tmp_path)}"]
    (alone,) = make_plan(load_recipe("paper-siglip-l16-384", overrides), "L4", tokens=16)["stages"]
    assert not alone["fits"]
    assert alone["devices_needed"] in (3, 9)


def wide(folder: Path) -> Path:
    """SigLIP with four times the width and a few blocks: about 1.4 billion parameters."""
    config = backbone_config("google/siglip-large-patch16-384", "vision")
    config.update({"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 6})
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["hive", "cascaded", "sa"])
def test_lengths_come_from_the_data(recipe: Recipe, method: str) -> None:
    plan = make_plan(recipe(method=method), "cpu")
    captions = plan["captions"]
    assert captions["source"] == "measured on the data"
    assert captions["samples"] == 32  # 40 images, a fifth held out
    assert 4 < captions["tokens"] <= captions["longest"] <= 30
    assert (plan["image_tokens_read"] > 0) == (method == "sa")


def test_lengths_are_assumed_without_data(recipe: Recipe) -> None:
    plan = make_plan(recipe(data={"train": "not/here"}), "cpu")
    assert plan["captions"]["tokens"] == 16
    assert plan["captions"]["longest"] == 77
    assert "assumed" in plan["captions"]["source"]


def test_epochs_need_data_or_samples(recipe: Recipe) -> None:
    epochs = stage(1, max_steps=None, epochs=2)
    arguments = recipe(data={"train": "not/here"}, stage1=epochs)
    with pytest.raises(ValueError, match="samples=N"):
        make_plan(arguments, "cpu")
    assert make_plan(arguments, "cpu", samples=40)["stages"][0]["steps"] == 20
    assert make_plan(recipe(stage1=epochs), "cpu")["stages"][0]["steps"] == 16


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"method": "base"}, {}, "method base trains nothing"),
        ({}, {"device": "H900"}, "unknown device 'H900'"),
        ({}, {"devices": 0}, "devices is 0"),
        ({}, {"devices": 3}, "stage1: batch_size is 4 but there are 3 processes"),
        ({"stage2": stage(2, rules={})}, {}, "stage2: no rule covers parameter"),
        ({"model": {"vision": "not/here"}}, {}, "vision backbone 'not/here'"),
    ],
)
def test_mistakes_are_one_line(
    recipe: Recipe, options: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make_plan(recipe(**options), **{"device": "cpu", "tokens": 8, **arguments})
    assert "\n" not in str(error.value)


def test_a_stage_without_steps_is_left_out(recipe: Recipe) -> None:
    plan = make_plan(recipe(stage2=stage(2, max_steps=0)), "cpu", tokens=8)
    assert [s["name"] for s in plan["stages"]] == ["stage1", "stage3"]


def test_a_miniature_is_made_first(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backbones are nowhere before."""
    made: list[MiniatureSettings] = []
    monkeypatch.setattr("hive_vision.studies.plan.ensure_miniature", made.append)
    miniature = MiniatureSettings("anywhere")
    make_plan(recipe(miniature=miniature), "cpu", tokens=8)
    assert made == [miniature]
