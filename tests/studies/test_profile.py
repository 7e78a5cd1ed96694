"""The profile of a recipe: counted, measured, and method beside method."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hive_vision.studies.plan import make_plan
from hive_vision.studies.profile import ProfileArguments, profile
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.miniature import MiniatureSettings
from hive_vision.training.recipes import load_recipe
from tests.training.conftest import recipe, stage

__all__ = ["recipe"]  # the fixture

Recipe = Callable[..., PretrainArguments]


def counted(arguments: PretrainArguments, **options: Any) -> dict[str, Any]:
    return profile(arguments, ProfileArguments(repetitions=0, **options))


def test_everything_is_measured_in_turns(recipe: Recipe) -> None:
    arguments = recipe(stage1=stage(1, max_steps=0), stage2=stage(2, max_steps=0))
    methods = ("sa", "hive")
    found = profile(arguments, ProfileArguments(methods, batch=3, tokens=6, repetitions=2))
    json.dumps(found)
    assert [s["name"] for s in found["stages"]] == ["stage3"]
    assert 0 < found["loading"] < 1
    for one in found["stages"]:
        for method in methods:
            numbers = one["methods"][method]
            assert len(numbers["seconds"]) == 2
            middle, low, high = numbers["seconds_spread"]
            assert low <= middle <= high
            assert 0 < numbers["share_of_ceiling"][0] < 1
            difference = numbers["counted_by_torch"] / numbers["flops_per_caption"] - 1
            assert abs(difference) < 0.05  # tiny models: a token less of one caption is much


def test_checkpointing_is_counted_as_it_is_measured(recipe: Recipe) -> None:
    arguments = recipe(
        gradient_checkpointing=True,
        stage1=stage(1, max_steps=0),
        stage2=stage(2, max_steps=0),
    )
    options = {"methods": ("hive",), "batch": 3, "tokens": 6, "scaling": False}
    (one,) = profile(arguments, ProfileArguments(repetitions=1, **options))["stages"]
    (plain,) = counted(replace(arguments, gradient_checkpointing=False), **options)["stages"]
    found = one["methods"]["hive"]
    assert found["counted_by_torch"] == pytest.approx(found["flops_per_caption"], rel=0.05)
    again = plain["methods"]["hive"]["flops_per_caption"]
    assert found["flops_per_caption"] > 1.1 * again


def test_only_sa_and_hive_are_scaled(recipe: Recipe) -> None:
    assert counted(recipe(), methods=("cascaded",), tokens=9)["scaling"] == []


def test_components_add_up_and_sa_reads_the_image(recipe: Recipe) -> None:
    (one,) = counted(recipe(), stages=("stage2",), tokens=9, scaling=False)["stages"]
    for numbers in one["methods"].values():
        total = sum(sum(part.values()) for part in numbers["flops"].values())
        assert total == pytest.approx(numbers["flops_per_caption"])
        vision = sum(numbers["flops"]["vision"].values())
        assert total - vision == pytest.approx(numbers["flops_beside_vision"])
    sa, hive = one["methods"]["sa"]["flops"], one["methods"]["hive"]["flops"]
    assert sa["vision"] == hive["vision"]
    assert sa["language model"]["forward"] > 2 * hive["language model"]["forward"]
    assert "cross-attention" not in sa


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    recipe = replace(load_recipe("paper-siglip-l16-384"), precision="bfloat16")
    return counted(recipe, methods=("sa", "hive"), stages=("stage2",), tokens=15, scaling=False)


def test_operations_of_the_paper_s_models(paper: dict[str, Any]) -> None:
    """As the study of costs worked them out by formulas, layer by layer."""
    (stage2,) = paper["stages"]
    hive = {
        name: sum(part.values()) / 1e9 for name, part in stage2["methods"]["hive"]["flops"].items()
    }
    assert hive["vision"] == pytest.approx(381, rel=0.02)
    assert hive["language model"] == pytest.approx(28, rel=0.05)
    assert hive["head"] == pytest.approx(3, rel=0.15)
    ratio = hive["vision"] / sum(hive.values())
    assert ratio == pytest.approx(0.79, abs=0.01)
    sa = stage2["methods"]["sa"]["flops_per_caption"] / 1e9
    assert sa == pytest.approx(1569, rel=0.07)  # causal attention is not halved by kernels


def test_scaling_agrees_with_the_plan_and_grows(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_vision.studies.profile.SCALING_SIDES", (16, 47, 64))
    found = counted(recipe(), methods=("sa", "hive"), stages=("stage2",), tokens=15)
    points = {(p["image_tokens"], p["text_tokens"]): p["flops"] for p in found["scaling"]}
    patches = sorted({image for image, _ in points})
    assert patches == [4, 16, 25, 64]  # 32 pixels are the encoder's own; patches are of 8
    own = found["stages"][0]["methods"]
    for method in ("sa", "hive"):
        assert points[16, 15][method] == pytest.approx(own[method]["flops_per_caption"])
        costs = [points[image, 15][method] for image in patches]
        assert costs == sorted(costs)
        assert points[16, 256][method] > points[16, 16][method]
    # The more image tokens, the more sa pays beside the encoder.
    beside = {p["image_tokens"]: p["beside_vision"] for p in found["scaling"]}
    shares = [beside[image]["hive"] / beside[image]["sa"] for image in patches]
    assert shares == sorted(shares, reverse=True)


def test_formulas_are_for_the_recipe(paper: dict[str, Any]) -> None:
    formulas = paper["formulas"]
    assert (formulas["language_layers"], formulas["selected_layers"]) == (32, 6)
    assert (formulas["image_tokens"], formulas["width"]) == (576, 960)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("base",)}, "methods has 'base'; it takes sa, hive, cascaded"),
        ({"methods": ()}, "methods is empty; give at least one of sa, hive, cascaded"),
        ({"batch": 0}, "batch is 0"),
        ({"stages": ("stage9",)}, "stages has 'stage9'; the recipe has stage1, stage2, stage3"),
    ],
)
def test_mistakes_are_one_line(recipe: Recipe, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        counted(recipe(), **options)
    assert "\n" not in str(error.value)


def test_a_miniature_is_made_first(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[MiniatureSettings] = []
    monkeypatch.setattr("hive_vision.studies.profile.ensure_miniature", made.append)
    miniature = MiniatureSettings("anywhere")
    counted(recipe(miniature=miniature), tokens=9, stages=("stage1",), scaling=False)
    assert made == [miniature]


def test_nothing_to_profile(recipe: Recipe) -> None:
    nothing = {f"stage{n}": stage(n, max_steps=0) for n in (1, 2, 3)}
    with pytest.raises(ValueError, match="max_steps is 0 in every stage"):
        counted(recipe(**nothing))


def test_a_measured_plan_has_the_speed_that_was_measured(recipe: Recipe) -> None:
    arguments = recipe(stage1=stage(1, max_steps=0), stage2=stage(2, max_steps=0))
    (measured,) = make_plan(arguments, tokens=8, measure=True)["stages"]
    found = measured["measured"]
    each = found["seconds"] / found["micro_batch"]
    hours = measured["steps"] * (measured["batch_size"] * each + found["optimizer_seconds"]) / 3600
    assert measured["hours"] == pytest.approx(hours)
    (assumed,) = make_plan(arguments, tokens=8)["stages"]
    assert assumed["measured"] is None
    factor = found["memory"] / found["predicted_memory"]
    for name, memory in assumed["memory"].items():
        for part, size in memory["at_micro_batch"].items():
            corrected = measured["memory"][name]["at_micro_batch"][part]
            assert corrected == pytest.approx(factor * size), part
    with pytest.raises(ValueError, match="device is 'H100', but measure=true"):
        make_plan(arguments, "H100", measure=True)
