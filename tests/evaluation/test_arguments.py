"""Defaults of the probes that come from the paper, and what a command line makes of settings."""

import pytest

from hive_vision.evaluation.arguments import PaperProtocol, ProbeArguments
from hive_vision.settings import read_settings


def test_table_4() -> None:
    """The paper's Table 4, and the epochs that its warmup implies."""
    paper = PaperProtocol()
    assert (paper.learning_rate, paper.weight_decay, paper.betas) == (2e-4, 0.01, (0.9, 0.999))
    assert (paper.batch_size, paper.max_grad_norm, paper.warmup_epochs) == (512, 3.0, 1.5)
    assert (paper.crop_scale, paper.crop_ratio) == ((0.4, 1.0), (0.75, 1.33))
    assert (paper.flip, paper.jitter) == (0.5, 0.2)
    assert paper.warmup_epochs / paper.epochs == pytest.approx(0.03)


def test_three_seeds_unless_told_otherwise() -> None:
    assert ProbeArguments().seeds == (0, 1, 2)


def test_overrides_of_every_depth() -> None:
    given = ["probe=attentive", "layer=11", "paper.epochs=5", "fast.inverse_penalties=[0.1,1.0]"]
    arguments = read_settings(ProbeArguments, given, what="probe")
    assert (arguments.probe, arguments.layer) == ("attentive", 11)
    assert arguments.paper.epochs == 5
    assert arguments.fast.inverse_penalties == (0.1, 1.0)
    assert read_settings(ProbeArguments, ["layer=penultimate"]).layer == "penultimate"


@pytest.mark.parametrize("given", ["probe=linaer", "layer=first", "fast.holdout=a", "seeds=[x]"])
def test_values_that_do_not_fit_are_named(given: str) -> None:
    with pytest.raises(ValueError, match=given.partition("=")[0]) as caught:
        read_settings(ProbeArguments, [given], what="probe")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seeds=[]", "give at least one"),
        ("seeds=[1,1]", "each once"),
        ("neighbours=0", "neighbours is 0"),
        ("seeds=-1", "give numbers from 0"),
        ("num_workers=-3", "num_workers is -3"),
        ("fast.batch_size=-1", r"fast\.batch_size is -1"),
        ("fast.epochs=0", r"fast\.epochs is 0"),
        ("fast.min_steps=-5", r"fast\.min_steps is -5"),
        ("fast.max_iterations=0", r"fast\.max_iterations is 0"),
        ("fast.inverse_penalties=0,1", r"fast\.inverse_penalties has 0"),
        ("paper.batch_size=0", r"paper\.batch_size is 0"),
        ("paper.micro_batch_size=0", r"paper\.micro_batch_size is 0"),
        ("paper.flip=2", r"paper\.flip is 2"),
        ("paper.epochs=0", r"paper\.epochs is 0"),
        ("fast.holdout=0", r"fast\.holdout is 0"),
        ("fast.inverse_penalties=[]", r"fast\.inverse_penalties is empty"),
    ],
)
def test_what_no_probe_can_have(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(ProbeArguments, [given], what="probe")


@pytest.mark.parametrize("pooling", ["cls", "head"])
def test_an_attentive_probe_pools_by_itself(pooling: str) -> None:
    with pytest.raises(ValueError, match=f"pooling is {pooling} but probe=attentive"):
        read_settings(ProbeArguments, ["probe=attentive", f"pooling={pooling}"], what="probe")


def test_no_neighbour_is_trained() -> None:
    with pytest.raises(ValueError, match="knn, which trains nothing, but protocol is"):
        read_settings(ProbeArguments, ["probe=knn", "protocol=paper"], what="probe")
