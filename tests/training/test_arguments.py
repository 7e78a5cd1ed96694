import pytest

from hive_vision.models.configuration import HiveConfig
from hive_vision.training.arguments import (
    DataArguments,
    ModelArguments,
    PretrainArguments,
    StageArguments,
)


def test_steps_follow_from_epochs():
    assert StageArguments(epochs=2.0, batch_size=64).steps(samples=640) == 20
    assert StageArguments(epochs=0.2, batch_size=64).steps(samples=3) == 1
    assert StageArguments(max_steps=0).steps(samples=640) == 0


@pytest.mark.parametrize("options", [{}, {"max_steps": 3, "epochs": 1.0}])
def test_steps_need_exactly_one_length(options):
    with pytest.raises(ValueError, match="exactly one"):
        StageArguments(**options).steps(samples=10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0.0}, "epochs is 0.0; it must be above 0"),
        ({"warmup": 1.0}, "warmup is 1.0; it is a share, at least 0 and below 1"),
        ({"min_learning_rate": 1.1}, "min_learning_rate is 1.1; it is a share, from 0 to 1"),
    ],
)
def test_numbers_outside_their_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        StageArguments(**options)
    assert StageArguments(min_learning_rate=1.0).min_learning_rate == 1.0  # a constant rate


def test_gradients_are_always_clipped():
    """Only then are they looked at."""
    with pytest.raises(ValueError, match="max_grad_norm is 0; it must be above 0"):
        StageArguments(max_grad_norm=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StageArguments(rules={"projectors": -1.0}),
        lambda: DataArguments("photos", num_workers=-1),
        lambda: DataArguments("photos", max_bad_fraction=-1.0),
        lambda: PretrainArguments(
            output="run", model=ModelArguments("v", "l"), data=DataArguments("d"), save_every=-1
        ),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make):
    with pytest.raises(ValueError, match=r"is -1"):
        make()


def test_fusion_options_are_those_of_the_configuration():
    options = ModelArguments("v", "l").fusion_options("hive")
    own = {name for name in HiveConfig.__annotations__ if not name.endswith("_config")}
    assert options.keys() == own
    defaults = HiveConfig()
    assert options == {name: getattr(defaults, name) for name in own}


def test_cascaded_reads_the_last_layer_through_one_projector():
    options = ModelArguments("v", "l").fusion_options("cascaded")
    assert options["layer_selection"] == "last"
    assert options["projector_shared"] is True
