"""The regression guard: what it says about better, worse and unchanged encoders."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hive_vision.models.backbones import load_vision_model
from hive_vision.models.processing import load_image_processor
from hive_vision.studies.regression_guard import RegressionGuard
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.pretrain import pretrain
from tests.evaluation.helpers import write_colours

Recipe = Any


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_colours(tmp_path_factory.mktemp("sets") / "colours", 60, 120))


@pytest.fixture
def guarded(recipe: Recipe, colours: str) -> PretrainArguments:
    return recipe(probe_after_stage=[colours])


def test_an_unchanged_encoder_is_no_worse(
    guarded: PretrainArguments, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hive_vision")
    vision = guarded.model.vision
    guard = RegressionGuard(guarded)
    found = guard("stage3", load_vision_model(vision), load_image_processor(vision))["colours"]
    assert found["now"] == found["base"]
    assert found["low"] < found["difference"] == 0 < found["high"]
    assert [r.levelname for r in caplog.records if "stage3 on colours" in r.message] == ["INFO"]


def test_a_ruined_encoder_is_told_of(
    guarded: PretrainArguments, caplog: pytest.LogCaptureFixture
) -> None:
    vision = guarded.model.vision
    model = load_vision_model(vision)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    found = RegressionGuard(guarded)("stage3", model, load_image_processor(vision))["colours"]
    assert found["high"] < 0
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.message.startswith("worse than before: stage3 on colours: ")


def test_a_run_probes_after_the_stages_that_train_the_encoder(
    guarded: PretrainArguments,
) -> None:
    results = pretrain(guarded, guard=RegressionGuard)
    probed = {stage["name"]: stage.get("probe") for stage in results["stages"]}
    assert probed["stage1"] is None
    assert probed["stage2"] is None
    kept = json.loads((Path(guarded.output) / "stage3" / "probe.json").read_text())
    assert kept == {"sets": guarded.probe_after_stage, "found": probed["stage3"]}
    assert set(kept["found"]["colours"]) == {"base", "now", "difference", "low", "high"}


def test_sets_that_were_added_are_probed_too(recipe: Recipe, colours: str, tmp_path: Path) -> None:
    """probe_after_stage may change between two starts."""
    arguments = recipe(probe_after_stage=[colours])
    pretrain(arguments, guard=RegressionGuard)
    (Path(arguments.output) / "results.json").unlink()
    more = str(write_colours(tmp_path / "more", 60, 120))
    found = pretrain(recipe(probe_after_stage=[colours, more]), guard=RegressionGuard)
    assert set(found["stages"][-1]["probe"]) == {"colours", "more"}


def test_the_guard_changes_no_weight(recipe: Recipe, colours: str, tmp_path: Path) -> None:
    plain = recipe(output=str(tmp_path / "plain"))
    pretrain(plain)
    guarded = recipe(output=str(tmp_path / "guarded"), probe_after_stage=[colours])
    pretrain(guarded, guard=RegressionGuard)
    weights = [
        (Path(run.output) / "encoder" / "model.safetensors").read_bytes()
        for run in (plain, guarded)
    ]
    assert weights[0] == weights[1]


def test_a_set_that_is_not_there_is_found_before_training(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="unknown classification set"):
        pretrain(recipe(probe_after_stage=["nothere"]), guard=RegressionGuard)


def test_without_a_guard_the_recipe_is_refused(guarded: PretrainArguments) -> None:
    with pytest.raises(ValueError, match="without a guard"):
        pretrain(guarded)
