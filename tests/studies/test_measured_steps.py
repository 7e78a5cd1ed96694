"""Real steps of a recipe's model with random weights."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hive_vision.studies.measured_steps import (
    MeasuredSteps,
    StepCase,
    measure_apart,
    measure_steps,
)
from hive_vision.studies.recipe_model import recipe_model
from hive_vision.training.arguments import PretrainArguments
from tests.training.conftest import recipe

__all__ = ["recipe"]  # the fixture

Recipe = Callable[..., PretrainArguments]


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_steps_are_timed_in_a_process_of_their_own(recipe: Recipe, method: str) -> None:
    state = torch.random.get_rng_state()
    case = StepCase(recipe(method=method), "stage3", 3, 6, steps=2, seconds=0, counts=True)
    found = measure_apart(case)
    assert torch.equal(state, torch.random.get_rng_state())
    assert found.steps == 2
    assert min(found.forward, found.backward, found.optimizer) > 0
    assert found.seconds == pytest.approx(found.forward + found.backward + found.optimizer, rel=0.5)
    model, _, _ = recipe_model(case.arguments)
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert found.memory > weights
    assert found.flops is not None
    assert found.flops > 6 * weights / 4  # more than two for each weight, forward and backward


def test_flops_are_counted_only_if_asked_for(recipe: Recipe) -> None:
    assert measure_steps(StepCase(recipe(), "stage1", 2, 5, seconds=0)).flops is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"side": 7}, ValueError, "not one stack of equal token grids"),  # smaller than a patch
        ({"batch": 10**13}, RuntimeError, "stage1 of hive with 10000000000000 captions of 5"),
    ],
)
def test_what_fails_is_one_line(
    recipe: Recipe, options: dict[str, int], error: type[Exception], words: str
) -> None:
    case = replace(StepCase(recipe(), "stage1", 2, 5), **options)
    with pytest.raises(error, match=words) as failure:
        measure_apart(case)
    assert "\n" not in str(failure.value)


def _die(case: StepCase) -> MeasuredSteps:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _fail(case: StepCase) -> MeasuredSteps:
    raise RuntimeError("shapes cannot be multiplied")


def test_advice_is_for_a_lack_of_memory_only(recipe: Recipe) -> None:
    case = StepCase(recipe(), "stage1", 2, 5)
    with pytest.raises(RuntimeError, match=r"stage1 of hive with 2 captions .* give fewer at once"):
        measure_apart(case, _die)
    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied$"):
        measure_apart(case, _fail)
