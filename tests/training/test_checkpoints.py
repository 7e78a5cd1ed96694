import errno
import json

import pytest
from safetensors.torch import load_file, save_file

from hive_vision.folders import check_folder, seal
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.training.checkpoints import (
    checkpoint_folder,
    checkpoints,
    last_checkpoint,
    load_strictly,
    new_checkpoint,
    remove_checkpoints,
    save_stage_model,
    step_of,
)
from hive_vision.training.stages import whole_weights


def write(stage, step, content=b"weights"):
    with new_checkpoint(stage, step, {"method": "hive"}) as aside:
        folder = aside / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(content)


def test_newest_first_by_number_and_two_are_kept(tmp_path):
    for step in (2, 9, 10, 100):
        write(tmp_path, step)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [100, 10]
    manifest = check_folder(checkpoint_folder(tmp_path, 100), "checkpoint")
    assert (manifest["step"], manifest["method"]) == (100, "hive")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_write_that_fails_keeps_the_older_ones(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    with pytest.raises(OSError, match="No space"), new_checkpoint(tmp_path, 3, {}):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [2, 1]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_broken_newest_one_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    newest = checkpoint_folder(tmp_path, 2)
    match damage:
        case "flip":
            (newest / "weights").write_bytes(b"weightS")
        case "cut":
            (newest / "weights").write_bytes(b"wei")
        case "delete":
            (newest / "weights").unlink()
        case "manifest":
            (newest / "manifest.json").unlink()
    assert last_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert "checkpoint-2 is broken" in caplog.text


def test_leftovers_are_removed_with_the_checkpoints(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".checkpoint-2.partial").mkdir()
    (tmp_path / "model").mkdir()
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert last_checkpoint(tmp_path) is None


@pytest.fixture(scope="module")
def handed_on(backbone_folders, tmp_path_factory):
    folders = (backbone_folders["siglip"], backbone_folders["llama"])
    model = HiveForConditionalGeneration.from_backbones(*folders)
    folder = tmp_path_factory.mktemp("stage") / "model"
    processor = HiveProcessor.from_backbones(*folders)
    save_stage_model(model, whole_weights(model), processor, folder, {"stage": "stage1"})
    return model, folder


def test_stage_model_comes_back_whole(handed_on):
    model, folder = handed_on
    assert check_folder(folder, "model")["stage"] == "stage1"
    assert "checkpoint-" not in json.dumps(check_folder(folder, "model"))
    loaded = load_strictly(HiveForConditionalGeneration, folder).state_dict()
    assert all((loaded[name] == weight).all() for name, weight in model.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_wrong_weights_are_named(handed_on, tmp_path, damage):
    model, folder = handed_on
    weights = load_file(folder / "model.safetensors")
    key = next(name for name in weights if name.startswith("projectors"))
    match damage:
        case "missing":
            del weights[key]
        case "unexpected":
            weights["foreign.weight"] = weights[key].clone()
        case "shape":
            weights[key] = weights[key].new_zeros(3, 5)
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    seal(tmp_path, "model")
    named = {"missing": key, "unexpected": "foreign.weight", "shape": r"\(3, 5\)"}[damage]
    with pytest.raises(ValueError, match=named) as error:
        load_strictly(HiveForConditionalGeneration, tmp_path)
    assert "\n" not in str(error.value)
