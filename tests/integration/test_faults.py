"""Whatever ends a run: the same command goes on, to the same bytes as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hive_vision.folders import read_manifest
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.pretrain import pretrain
from tests.conftest import write_image_folder
from tests.integration.conftest import STEPS
from tests.integration.faults import Strike, log_of, outcome, run, write_recipe
from tests.training.conftest import stage

Recipe = Callable[..., PretrainArguments]
LINES = STEPS + 1  # that a stage writes to metrics.jsonl: its steps and a summary


@pytest.fixture(scope="module")
def recipe_file(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", small_recipe(folder / "run"))


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path) -> object:
    output = recipe_file.parent / "undisturbed"
    assert run(recipe_file, output)[0] == 0
    result = outcome(output)
    logged = [(line["stage"], line["step"]) for line in result["logged"]]
    assert logged == [(f"stage{n}", step) for n in (1, 2, 3) for step in range(1, STEPS + 1)]
    return result


def test_three_kills(recipe_file, undisturbed, tmp_path):
    """Before any checkpoint; in a second epoch; inside the write of a checkpoint."""
    output = tmp_path / "run"
    assert run(recipe_file, output, Strike("write metrics.jsonl", 2))[0] == -signal.SIGKILL
    assert not list(output.glob("*/checkpoint-*"))
    code, log = run(recipe_file, output, Strike("write metrics.jsonl", LINES + 5))
    assert code == -signal.SIGKILL
    assert "stage2  4/6" in log
    writing = Strike("write stage3/.checkpoint-4.partial/*/trainer_state.json")
    code, log = run(recipe_file, output, writing)
    assert code == -signal.SIGKILL
    assert "stage1 is already finished" in log
    assert "stage2  4/6" not in log
    assert (output / "stage3" / ".checkpoint-4.partial").is_dir()
    assert not (output / "stage3" / "checkpoint-4").exists()
    assert run(recipe_file, output)[0] == 0
    assert outcome(output) == undisturbed


def test_kills_around_folders_and_summaries(recipe_file, undisturbed, tmp_path):
    output = tmp_path / "run"
    points = (
        "write stage1/.checkpoint-2.partial/*/manifest.json.partial",
        "rename stage1/checkpoint-4",
        "write stage1/.model.partial/config.json",
        "write stage1/result.json.partial",
        "rename stage1/model",  # the one written before is gone by now
        "rmtree stage1/checkpoint-6",  # the stage is done, its checkpoints are still there
        "write stage2/before.json.partial",
        "write .encoder.partial/manifest.json.partial",
        "write results.json.partial",
    )
    for point in points:
        code, log = run(recipe_file, output, Strike(point))
        assert code == -signal.SIGKILL, f"{point} was never reached: {log}"
    assert run(recipe_file, output)[0] == 0
    assert outcome(output) == undisturbed


def test_signals(recipe_file, undisturbed, tmp_path):
    output = tmp_path / "run"
    for name, strikes, code in (
        ("stage1", [Strike("write metrics.jsonl", 2, signal.SIGTERM)], 143),
        ("stage2", [Strike("write metrics.jsonl", LINES, signal.SIGINT)], 130),
    ):
        found, log = run(recipe_file, output, *strikes)
        assert found == code, log
        (newest, *_) = sorted((output / name).glob("checkpoint-*"), reverse=True)
        step = newest.name.partition("-")[2]
        assert f"{name} stopped after step {step}, saved; run the same command again" in log
    # Ctrl-C, and again while the checkpoint is written: not saved, nothing lost that was.
    first = Strike("write metrics.jsonl", 1, signal.SIGINT)
    second = Strike("write stage?/.checkpoint-*", 1, signal.SIGINT, after=1.1)
    before = sorted(output.glob("stage2/checkpoint-*"))
    code, log = run(recipe_file, output, first, second)
    assert (code, "press Ctrl-C again" in log) == (130, True), log
    assert sorted(output.glob("stage2/*checkpoint-*")) == before
    assert run(recipe_file, output)[0] == 0
    assert outcome(output) == undisturbed


def test_sigterm_to_everyone(recipe_file, undisturbed, tmp_path):
    """As launchers and schedulers send it: to the loader's workers too."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "hive_vision", "pretrain", str(recipe_file)]
    command += [f"output={output}", "data.num_workers=2"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (output / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert "saved; run the same command again" in errors
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "stage1 goes on from step " in again.stderr
    assert outcome(output) == undisturbed


def test_disk_full(recipe_file, undisturbed, tmp_path):
    """One line of error wherever the disk is full; with room, the run goes on."""
    output = tmp_path / "run"
    for point in ("write stage2/.checkpoint-4.*", "write stage2/.model.*", "write .encoder.*"):
        code, log = run(recipe_file, output, Strike(point, action="disk full"))
        assert code == 1, log
        (line,) = [line for line in log.splitlines() if line.startswith("hive-vision: ")]
        assert log.endswith(f"{line}\n"), log
        assert "Traceback" not in log
        if "checkpoint" in point:
            kept = output / "stage2" / "checkpoint-2"
            assert f"last good one: {kept}. Make room if the disk is full, and run the same" in line
            assert [kept] == list((output / "stage2").glob("*checkpoint-*"))
    assert run(recipe_file, output)[0] == 0
    assert outcome(output) == undisturbed


def test_command_killed_while_it_writes_a_checkpoint(recipe_file, undisturbed, tmp_path):
    """The command itself, stopped again and again until it stands inside a write; then killed."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "hive_vision", "pretrain", str(recipe_file)]
    with log_of(output).open("w") as log:
        process = subprocess.Popen([*command, f"output={output}"], stdout=log, stderr=log)
        while not list(output.glob("stage2/.checkpoint-*")):
            assert process.poll() is None, log_of(output).read_text()
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.001)
            os.kill(process.pid, signal.SIGSTOP)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(output.glob("stage2/.checkpoint-*"))
    subprocess.run([*command, f"output={output}"], check=True, capture_output=True)
    assert outcome(output) == undisturbed


@pytest.fixture(scope="module")
def last_stage(small_recipe: Recipe) -> Recipe:
    """Recipes of the last stage alone."""

    def make(output: Path, **options: object) -> PretrainArguments:
        left_out = {f"stage{n}": stage(n, max_steps=0) for n in (1, 2)}
        return small_recipe(output, **left_out, **options)

    return make


@pytest.fixture(scope="module")
def stopped(last_stage: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at step 5, with checkpoints 4 and 5."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(InterruptedRunError):
        pretrain(last_stage(output), stop_after=("stage3", 5))
    return output


@pytest.fixture(scope="module")
def whole(last_stage: Recipe, tmp_path_factory: pytest.TempPathFactory) -> object:
    output = tmp_path_factory.mktemp("whole") / "run"
    pretrain(last_stage(output))
    return outcome(output)


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lose_the_manifest])
def test_broken_checkpoint(damage, stopped, whole, last_stage, tmp_path, caplog):
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    newest = output / "stage3" / "checkpoint-5"
    damage(newest)
    caplog.clear()
    with caplog.at_level("INFO", logger="hive_vision"):
        pretrain(last_stage(output))
    steps = [line.split()[1] for line in caplog.messages if line.startswith("stage3  ")]
    assert steps == ["5/6", "6/6"]
    (warning,) = [line for line in caplog.messages if "is broken" in line]
    assert warning.startswith(f"{newest} is broken")
    assert "using the one before it" in warning
    assert outcome(output) == whole


def test_all_checkpoints_broken(stopped, whole, last_stage, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    for checkpoint in (output / "stage3").glob("checkpoint-*"):
        flip_a_bit(checkpoint)
    pretrain(last_stage(output))
    assert outcome(output) == whole


def test_changed_data_is_refused(last_stage, tmp_path):
    images = write_image_folder(tmp_path / "images", 15)
    recipe = last_stage(tmp_path / "run", data={"train": str(images)})
    with pytest.raises(InterruptedRunError):
        pretrain(recipe, stop_after=("stage3", 1))
    (checkpoint,) = (tmp_path / "run" / "stage3").glob("checkpoint-*")
    saved = read_manifest(checkpoint, "checkpoint")["data"]["fingerprint"]
    metadata = images / "metadata.jsonl"
    content = metadata.read_text()
    for replacement in ("a bed", "b red"):  # another caption; the same number of bytes
        metadata.write_text(content.replace("a red", replacement, 1))
        assert metadata.read_text() != content
        with pytest.raises(ValueError, match="restore the data or give another output") as error:
            pretrain(recipe)
        line = str(error.value)
        assert "\n" not in line
        assert f"fingerprint {saved}, but the data now has 12 with " in line
    metadata.write_text(content)
    pretrain(recipe)


@pytest.mark.parametrize(
    "options", [{"models": "-dropout"}, {"data": {"num_workers": 2}}], ids=["dropout", "workers"]
)
def test_random_numbers_and_workers_go_on(options, whole, last_stage, tmp_path):
    for name, stops in (("undisturbed", False), ("stopped", True)):
        if stops:
            with pytest.raises(InterruptedRunError):
                pretrain(last_stage(tmp_path / name, **options), stop_after=("stage3", 3))
        pretrain(last_stage(tmp_path / name, **options))
    result = outcome(tmp_path / "stopped")
    assert result == outcome(tmp_path / "undisturbed")
    if "models" in options:
        assert result["logged"] != whole["logged"], "there is no dropout in this test"
    else:
        assert result == whole, "what workers read is not what the process itself reads"
