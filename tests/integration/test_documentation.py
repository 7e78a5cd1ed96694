"""Every command in the README and the docs runs: parsed here, or scaled down."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from hive_vision.cli import main
from hive_vision.cli.evaluate import parse as parse_evaluate
from hive_vision.cli.probe import parse as parse_probe
from hive_vision.data.sources import Source
from hive_vision.settings import read_settings
from hive_vision.studies.compare import CompareArguments
from hive_vision.training.hardware import split_batch
from hive_vision.training.recipes import (
    load_finetune_recipe,
    load_recipe,
    recipe_names,
)
from tests.conftest import write_image_folder

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / folder / "README.md" for folder in (".", "benchmarks")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            match = re.match(r"^(?:    |\$ )(hive-vision .*?)(?:\s+#.*)?$", line)
            if match:
                found.append(match[1])
    return found


def test_there_are_commands():
    assert any(command.startswith("hive-vision pretrain") for command in commands())
    assert any(command.startswith("hive-vision demo") for command in commands())


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command, capsys):
    _, name, *arguments = shlex.split(command)
    if name == "pretrain":
        arguments = [argument for argument in arguments if not argument.startswith("--")]
        load_recipe(*arguments[:1], arguments[1:])
    elif name == "probe":
        mode, own, encoders, _ = parse_probe(arguments)
        assert encoders
        assert set(own) <= {"data", "output", "alphas"}
        assert mode or len(encoders) == 1
    elif name == "compare":
        read_settings(CompareArguments, arguments[1:], ROOT / arguments[0], "study")
    else:
        main([name, *arguments, "--help"])
        usage = capsys.readouterr().out
        assert all(a.partition("=")[0] in usage for a in arguments if a.startswith("--"))


def launches() -> list[list[str]]:
    """Commands that start several processes, also over several lines."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:srun )?((?:torchrun|accelerate launch) .*)$", text, re.M):
            found.append(shlex.split(line))
    return found


@pytest.mark.parametrize("words", launches(), ids=lambda words: " ".join(words[:3]))
def test_launch_of_several_processes_is_accepted(words):
    if words[0] == "torchrun":
        options = torchrun_parser().parse_args(words[1:])
    else:
        options = launch_command_parser().parse_args(words[2:])
    assert options.module
    assert options.training_script == "hive_vision"
    name, recipe, *overrides = options.training_script_args
    assert name == "pretrain"
    arguments = load_recipe(recipe, overrides)
    machines = 2 if "--nnodes" in words else 1
    for stage in arguments.stages.values():
        micro, accumulation = split_batch(
            stage.batch_size, arguments.micro_batch_size, 8 * machines
        )
        assert micro * accumulation * 8 * machines == stage.batch_size


def test_there_are_launches():
    assert {words[0] for words in launches()} == {"torchrun", "accelerate"}
    assert any("--nnodes" in words for words in launches())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_scripts_are_valid(page, tmp_path):
    scripts = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert page.name != "scale.md" or any("#SBATCH" in script for script in scripts)
    for number, script in enumerate(scripts):
        path = tmp_path / f"{number}.sh"
        path.write_text(script, encoding="utf-8")
        checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_commands_of_the_vlm_study_are_accepted(tmp_path, monkeypatch):
    """A script; a stand-in writes down what it would run."""
    stand_in = tmp_path / "hive-vision"
    stand_in.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" --- >> "$LOG"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    log = tmp_path / "log"
    script = ROOT / "benchmarks" / "studies" / "miniature_vlm.sh"
    place = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    subprocess.run(["bash", script], check=True, env=place)
    monkeypatch.chdir(tmp_path)  # where no run lies
    outputs = set()
    for text in log.read_text(encoding="utf-8").split("\n---\n")[:-1]:
        name, *words = text.splitlines()
        if name == "evaluate":
            models, _, _ = parse_evaluate(words)
            assert {folder for folders in models.values() for folder in folders} <= outputs
            assert [len(folders) for folders in models.values()] == [3, 3, 3]
            continue
        read = {"pretrain": load_recipe, "finetune": load_finetune_recipe}[name]
        arguments = read(words[0], words[1:])
        made = arguments.model.vision.removesuffix("/encoder")
        assert made in outputs or made == "runs/miniature/foundations/siglip"
        outputs.add(arguments.output)
    assert len(outputs) == 6 + 9


def write_llava_data(folder):
    """LLaVA-CC3M-Pretrain-595K's format: chat.json beside a folder of images."""
    write_image_folder(folder / "images", 20)
    samples = [
        {
            "id": image.stem,
            "image": image.name,
            "conversations": [
                {"from": "human", "value": "Describe it.\n<image>"},
                {"from": "gpt", "value": f"a small red circle and {number} blue stars"},
            ],
        }
        for number, image in enumerate(sorted((folder / "images").glob("*.png")))
    ]
    (folder / "chat.json").write_text(json.dumps(samples), encoding="utf-8")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The debug recipe's run, which makes tiny models that the other recipes run on."""
    folder = tmp_path_factory.mktemp("debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["pretrain", "debug", "stage3.max_steps=1"])
    return folder / "runs"


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_runs_scaled_down(name, small_run, tmp_path, monkeypatch):
    """On tiny models and three steps for each stage; own images instead of the recipe's."""
    if name == "debug":
        assert (small_run / "debug" / "encoder" / "model.safetensors").is_file()
        return
    monkeypatch.chdir(tmp_path)
    given = load_recipe(name).data.train
    if isinstance(given, Source):  # in its own format, where the recipe says
        write_llava_data(tmp_path / Path(given.path).parent)
        data = []
    else:
        data = [f"data.train={write_image_folder(tmp_path / 'photos', 20)}"]
    models = small_run / "debug-miniature" / "foundations"
    main(
        [
            "pretrain",
            name,
            "miniature=null",
            f"model.vision={models / 'siglip'}",
            f"model.language={models / 'llama'}",
            *data,
            "data.validation=null",
            "data.num_workers=0",
            "output=runs/own",
            *(f"stage{n}.max_steps=3" for n in (1, 2, 3)),
            *(f"stage{n}.batch_size=4" for n in (1, 2, 3)),
        ]
    )
    assert (tmp_path / "runs" / "own" / "encoder" / "model.safetensors").is_file()


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """The README's example, as it stands there."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 9
    write_image_folder(tmp_path / "photos", 1)
    scope: dict[str, object] = {}
    exec(code.replace("photo.jpg", "photos/000.png"), scope)
    assert scope["captions"]
    assert "SiglipVisionModel" in str(type(scope["encoder"]))
