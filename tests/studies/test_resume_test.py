import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hive_vision.studies import resume_test
from hive_vision.studies.resume_test import prove_resume


def test_stopped_runs_end_as_undisturbed_ones(recipe, tmp_path):
    proof = prove_resume(recipe(save_every=1), steps=2)
    assert [stage.name for stage in proof.stages] == ["stage1", "stage2", "stage3"]
    assert all(stage.losses_equal and stage.weights_equal for stage in proof.stages)
    assert proof.holds
    assert list(tmp_path.iterdir()) == [], "a proof leaves nothing behind"


def write_run(run: Path, weight: torch.Tensor, loss: float) -> Path:
    (run / "stage1" / "model").mkdir(parents=True)
    save_file({"a": weight}, run / "stage1" / "model" / "model.safetensors")
    line = {"stage": "stage1", "step": 1, "loss": loss}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run


@pytest.mark.parametrize("what", ["nothing", "weight", "zero's sign", "loss"])
def test_every_difference_is_seen(tmp_path, what):
    weight = torch.tensor([0.0, 1.0])
    other = weight.clone()
    match what:
        case "weight":
            other[1] = torch.nextafter(other[1], torch.tensor(2.0))
        case "zero's sign":
            other[0] = -0.0
    one = write_run(tmp_path / "one", weight, 2.0)
    two = write_run(tmp_path / "two", other, 2.5 if what == "loss" else 2.0)
    (stage,) = resume_test._compare(one, two, ["stage1"])
    assert stage.losses_equal == (what != "loss")
    assert stage.weights_equal == (what in ("nothing", "loss"))
    assert load_file(one / "stage1" / "model" / "model.safetensors").keys() == {"a"}


def test_what_cannot_be_proven_is_refused(recipe, monkeypatch):
    with pytest.raises(ValueError, match="trains nothing"):
        prove_resume(recipe(method="base"), steps=2)
    with pytest.raises(ValueError, match="steps is 0"):
        prove_resume(recipe(), steps=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        prove_resume(dataclasses.replace(recipe()), steps=1)
