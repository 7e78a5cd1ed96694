"""Two gloo processes give what one gives: DDP and FSDP2, all methods and stages.

Not collected by ``make test``, whose two workers would fight with them for the cores
(``make test-distributed``).
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hive_vision.folders import check_folder
from tests.conftest import WORDS
from tests.data.helpers import write_coco, write_images
from tests.distributed import several_processes
from tests.evaluation.helpers import write_colours
from tests.training.conftest import VLM_RULES, write_conversations

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
# Sums over two processes round differently; AdamW then amplifies what is near zero.
LOSS_TOLERANCE = 1e-5
FOUNDATIONS = {"vision": "siglip", "language": "llama"}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, backbone_folders, image_folder):
    stages = {
        "stage1": {"vision_model": "frozen", "language_model": "frozen"},
        "stage2": {"vision_model": "frozen", "language_model": 1e-3},
        "stage3": {"vision_model": 1e-3, "language_model": 1e-3},
    }
    fused = {"projectors": 1e-3, "cross_attentions": 1e-3}
    recipe = {
        "output": "unused",
        "model": {
            "vision": str(backbone_folders["siglip"]),
            "language": str(backbone_folders["llama"]),
        },
        "data": {"train": str(image_folder), "holdout": 0.25},
        **{
            name: {"rules": {**fused, **rules}, "max_steps": 3, "batch_size": 8}
            for name, rules in stages.items()
        },
        "micro_batch_size": 2,
        "precision": "float32",  # sharded weights are rounded to bfloat16 elsewhere than whole ones
        "log_every": 1,
        "save_every": 2,
    }
    path = tmp_path_factory.mktemp("several") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def launch(*arguments, **options):
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        },
        **options,
    )


# Its head is sharded apart from everything else, and 10 held-out captions in batches of 4 leave
# the second process without any at the end.
UNTIED = "untied,micro_batch_size=4,model.language={olmo2}"
# Conversations of which a third have no image: often one process's whole micro-batch.
VLM = "vlm,finetune={vlm},precision=float32"
# Groups of three in micro-batches of four: the processes have different numbers of images.
GROUPED = "data.train={coco},data.group_captions=true,micro_batch_size=4"
GROUPED_HIVE, GROUPED_SA = f"grouped,{GROUPED}", f"grouped-sa,{GROUPED},method=sa"
SCENARIOS = {
    "one": [
        "hive",
        "sa,method=sa",
        "cascaded,method=cascaded",
        UNTIED,
        VLM,
        GROUPED_HIVE,
        GROUPED_SA,
    ],
    "ddp": [
        "hive",
        "stopped:stage2:2,probe_after_stage=[{colours}]",
        "sa,method=sa,gradient_checkpointing=true,cache_features=always",
        "cascaded,method=cascaded,micro_batch_size=4",
        f"{VLM},cache_features=always",
        f"{GROUPED_HIVE},cache_features=always",
    ],
    "fsdp2": [
        "hive,sharding=fsdp2",
        "stopped:stage3:1,sharding=fsdp2",
        "sa,sharding=fsdp2,method=sa,gradient_checkpointing=true",
        "cascaded,sharding=fsdp2,method=cascaded,gradient_checkpointing=true",
        f"{UNTIED},sharding=fsdp2",
        f"{GROUPED_SA},sharding=fsdp2",
    ],
}


def write_vlm_recipe(folder, backbone_folders):
    data = {"train": str(write_conversations(folder / "chat", 40)), "holdout": 0.2}
    recipe = {
        "output": "unused",
        "model": {
            "vision": str(backbone_folders["siglip"]),
            "language": str(backbone_folders["llama"]),
            "chat_template": "llava",
        },
        "data": {"stage1": data, "stage2": data},
        **{
            f"stage{number}": {"rules": rules, "max_steps": 4, "batch_size": 4}
            for number, rules in enumerate(VLM_RULES, start=1)
        },
        "micro_batch_size": 2,
        "log_every": 1,
    }
    path = folder / "vlm.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def runs(recipe_file, backbone_folders):
    """All scenarios: with one process, with two, with two that share the weights."""
    root = recipe_file.parent
    colours = write_colours(root / "colours", 60, 120)
    olmo2 = backbone_folders["olmo2"]
    vlm = write_vlm_recipe(root, backbone_folders)
    captions = [[" ".join(WORDS[(i + j) % 7 :]) for j in range(3)] for i in range(12)]
    coco = write_coco(root / "coco.json", write_images(root, 12), captions)
    for kind, names in SCENARIOS.items():
        (root / kind).mkdir()
        found = {"olmo2": olmo2, "colours": colours, "vlm": vlm, "coco": coco}
        scenarios = [name.format(**found) for name in names]
        if kind == "one":
            several_processes.main(recipe_file, root / kind, scenarios)
            continue
        script = HERE / "several_processes.py"
        completed = launch(script, recipe_file, root / kind, *scenarios)
        # All of it: what a process that aborts says stands long before the launcher's summary.
        assert completed.returncode == 0, f"{kind}:\n{completed.stderr}"
    return root


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["hive", "sa", "cascaded"])
def test_two_processes_are_one(runs, kind, method):
    one, two = runs / "one" / method, runs / kind / method
    batches = [json.loads(run.with_suffix(".json").read_text()) for run in (one, two)]
    assert batches[0] == batches[1]
    assert len(batches[0]) == 3
    assert losses(two) == pytest.approx(losses(one), rel=LOSS_TOLERANCE)
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for key in ("held_out_loss", "held_out_loss_shuffled_images"):
        assert results[1][key] == pytest.approx(results[0][key], rel=LOSS_TOLERANCE)
    assert results[0]["stages"][0]["update_proof"] == results[1]["stages"][0]["update_proof"]
    encoders = [load_file(run / "encoder" / "model.safetensors") for run in (one, two)]
    assert encoders[0].keys() == encoders[1].keys()
    for name, weight in encoders[0].items():
        torch.testing.assert_close(encoders[1][name], weight, rtol=0, atol=3e-3)


def test_the_encoder_is_probed_by_one_process(runs):
    """And the others go on with what it found."""
    stages = json.loads((runs / "ddp" / "stopped" / "results.json").read_text())["stages"]
    assert [set(stage.get("probe", ())) for stage in stages] == [set(), set(), {"colours"}]


def test_text_only_batches_of_one_process_harm_nothing(runs):
    """Nobody waits for a gradient of the connector that the other process does not have."""
    one, two = runs / "one" / "vlm", runs / "ddp" / "vlm"
    assert losses(two) == pytest.approx(losses(one), rel=LOSS_TOLERANCE)
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=3e-2)


@pytest.mark.parametrize(("kind", "name"), [("ddp", "grouped"), ("fsdp2", "grouped-sa")])
def test_captions_of_an_image_in_two_processes(runs, kind, name):
    one, two = runs / "one" / name, runs / kind / name
    batches = [json.loads(run.with_suffix(".json").read_text()) for run in (one, two)]
    assert batches[0] == batches[1]
    assert losses(two) == pytest.approx(losses(one), rel=LOSS_TOLERANCE)
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for key in ("held_out_loss", "held_out_loss_shuffled_images"):
        assert results[1][key] == pytest.approx(results[0][key], rel=LOSS_TOLERANCE)


def test_sharded_head_of_its_own(runs):
    one, two = runs / "one" / "untied", runs / "fsdp2" / "untied"
    assert losses(two) == pytest.approx(losses(one), rel=LOSS_TOLERANCE)
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert results[1]["held_out_loss"] == pytest.approx(
        results[0]["held_out_loss"], rel=LOSS_TOLERANCE
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_stopped_and_continued_is_undisturbed(runs, kind):
    """From a sharded checkpoint as well, bit for bit."""
    for folder in ("stage3/model", "encoder"):
        one = load_file(runs / kind / "hive" / folder / "model.safetensors")
        other = load_file(runs / kind / "stopped" / folder / "model.safetensors")
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert losses(runs / kind / "stopped") == losses(runs / kind / "hive")
    check_folder(runs / kind / "stopped" / "encoder", "encoder")


def test_accelerate_launches_too(recipe_file, runs):
    output = recipe_file.parent / "accelerate"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "hive_vision", "pretrain", str(recipe_file)]
    completed = subprocess.run(
        [*command, f"output={output}"], capture_output=True, text=True, check=False, timeout=300
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    assert losses(output) == pytest.approx(losses(runs / "one" / "hive"), rel=LOSS_TOLERANCE)
    assert completed.stdout.count("held-out caption loss") == 1


@contextmanager
def endless_run(recipe_file, output):
    """A run of two processes that has begun to train."""
    command = [*LAUNCH, "-m", "hive_vision", "pretrain", str(recipe_file), f"output={output}"]
    with subprocess.Popen(
        [*command, "stage1.max_steps=100000", "save_every=0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as launcher:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            yield launcher
        finally:
            launcher.kill()


def lines_of_ours(errors):
    return [line for line in errors.splitlines() if line.startswith("hive-vision: ")]


@pytest.mark.parametrize("victim", [0, 1])
def test_dead_rank_stops_the_others_with_one_line(recipe_file, tmp_path, victim):
    output = tmp_path / "run"
    with endless_run(recipe_file, output) as launcher:
        sign = json.loads((output / ".ranks" / str(victim)).read_text())
        os.kill(sign["pid"], signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    lines = lines_of_ours(errors)
    assert len(lines) == 1, errors
    assert lines[0].startswith(f"hive-vision: rank {victim} of 2 (process {sign['pid']} on ")
    assert "died; run the same command again to go on" in lines[0]


def test_second_start_is_refused_and_harms_nothing(recipe_file, tmp_path):
    output = tmp_path / "run"
    with endless_run(recipe_file, output) as launcher:
        again = launch(
            *("-m", "hive_vision", "pretrain", recipe_file, f"output={output}"),
            *("stage1.max_steps=100000", "save_every=0"),
        )
        assert again.returncode != 0
        assert "another process is training in" in lines_of_ours(again.stderr)[0]
        time.sleep(8)  # longer than a process watches another one that seems to be dead
        assert launcher.poll() is None
        launcher.terminate()
        _, errors = launcher.communicate(timeout=120)
    assert "stopped after step" in errors


def test_error_of_all_ranks_is_said_once(tmp_path):
    """After one of them has trained the miniature's models for both."""
    folder = tmp_path / "miniature"
    completed = launch(
        *("-m", "hive_vision", "pretrain", "debug", f"output={tmp_path / 'run'}"),
        *(f"miniature.folder={folder}", "miniature.foundations.language_steps=2"),
        *(f"model.{part}={folder}/foundations/{name}" for part, name in FOUNDATIONS.items()),
        *(f"data.{part}={folder}/data/captions/{part}" for part in ("train", "validation")),
        "stage2.batch_size=7",
    )
    assert completed.returncode != 0
    lines = lines_of_ours(completed.stderr)
    assert len(lines) == 1, completed.stderr
    assert "batch_size is 7 but there are 2 processes" in lines[0]
