"""Every command in the README and the docs runs: parsed here, or scaled down."""

import re
import shlex
from pathlib import Path

import pytest

from hive_vision.cli import main
from hive_vision.training.recipes import load_recipe, recipe_names, recipe_path
from tests.conftest import write_image_folder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    else:
        main([name, *arguments, "--help"])
        usage = capsys.readouterr().out
        assert all(a.partition("=")[0] in usage for a in arguments if a.startswith("--"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_runs_scaled_down(name, tmp_path, monkeypatch):
    """On tiny models and two steps for each stage; own images instead of the miniature's."""
    monkeypatch.chdir(tmp_path)
    photos = write_image_folder(tmp_path / "photos", 20)
    small = recipe_path("debug").read_text()
    (tmp_path / "debug.yaml").write_text(small)
    main(["pretrain", "debug.yaml", "stage3.max_steps=1"])
    models = tmp_path / "runs" / "debug-miniature" / "foundations"
    if name == "debug":
        return
    main(
        [
            "pretrain",
            name,
            "miniature=null",
            f"model.vision={models / 'siglip'}",
            f"model.language={models / 'llama'}",
            f"data.train={photos}",
            "data.validation=null",
            "output=runs/own",
            *(f"stage{n}.max_steps=2" for n in (1, 2, 3)),
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
