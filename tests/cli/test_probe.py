import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from hive_vision.cli import main
from tests.cli.helpers import failure
from tests.evaluation.helpers import write_colours


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_colours(tmp_path_factory.mktemp("sets") / "colours"))


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory, backbone_folders: dict[str, Path]) -> str:
    """A run folder whose encoder says the same of every image."""
    folder = tmp_path_factory.mktemp("runs") / "ruined"
    model = AutoModel.from_pretrained(backbone_folders["siglip"])
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder / "encoder")
    processor = AutoImageProcessor.from_pretrained(backbone_folders["siglip"])
    processor.save_pretrained(folder / "encoder")
    return str(folder)


@pytest.fixture
def options(tmp_path: Path, colours: str) -> list[str]:
    return [f"data={colours}", f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]


def test_help_lists_sets_modes_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    main(["probe", "--help"])
    text = capsys.readouterr().out
    for word in ("--compare", "--layers", "--interpolate", "caltech-256", "--paper.epochs", "knn"):
        assert word in text


def test_one_encoder(
    capsys: pytest.CaptureFixture[str],
    backbone_folders: dict[str, Path],
    options: list[str],
    tmp_path: Path,
) -> None:
    main(["probe", str(backbone_folders["siglip"]), "seeds=3,5", *options])
    text = capsys.readouterr().out
    assert " siglip" in text
    assert "colours" in text
    assert "2 seeds" in " ".join(text.split())
    assert "interval" not in text.splitlines()[0]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["results"]["siglip"]["colours"]
    assert set(found["by_seed"]) == {"3", "5"}
    assert found["settings"]["protocol"] == "fast"
    assert found["settings"]["inverse_penalties"]


def test_compare_names_the_better_one(
    capsys: pytest.CaptureFixture[str],
    backbone_folders: dict[str, Path],
    ruined: str,
    options: list[str],
    tmp_path: Path,
) -> None:
    encoders = [f"base={ruined}", f"hive={backbone_folders['siglip']}"]
    main(["--quiet", "probe", "--compare", *encoders, "probe=knn", *options])
    text = capsys.readouterr().out
    assert "hive - base" in text
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("| accuracy, % | base | hive |")
    assert "**" in table.splitlines()[2]
    (difference,) = json.loads((tmp_path / "out" / "results.json").read_text())["differences"][
        "colours"
    ]
    assert difference["low"] > 0


def test_layers_draws_a_figure(
    capsys: pytest.CaptureFixture[str],
    backbone_folders: dict[str, Path],
    options: list[str],
    tmp_path: Path,
) -> None:
    main(["probe", "--layers", f"base={backbone_folders['siglip']}", "probe=knn", *options])
    assert f"figure: {tmp_path / 'out' / 'layers.png'}" in capsys.readouterr().out
    for ending in ("png", "svg"):
        assert (tmp_path / "out" / f"layers.{ending}").stat().st_size > 1000
    layers = json.loads((tmp_path / "out" / "results.json").read_text())["layers"]
    assert [layer["settings"]["layer"] for layer in layers["colours"]["base"]] == list(range(1, 9))


def test_interpolate_draws_a_figure(
    capsys: pytest.CaptureFixture[str],
    backbone_folders: dict[str, Path],
    ruined: str,
    options: list[str],
    tmp_path: Path,
) -> None:
    command = ["probe", "--interpolate", ruined, f"base={backbone_folders['siglip']}", "probe=knn"]
    main([*command, "alphas=0,1", *options])
    assert (tmp_path / "out" / "interpolation.png").is_file()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["alphas"] == [0, 1]
    before, after = content["interpolation"]["colours"]["knn"]
    assert before["mean"] > after["mean"]
    assert "colours: alpha" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x"], "no classification set given; add data=cifar10"),
        (["data=cifar10"], "give one encoder, or --compare; got 0"),
        (["x", "y", "data=cifar10"], "give one encoder, or --compare; got 2"),
        (["--compare", "a=x", "a=y", "data=cifar10"], "two encoders are called 'a'"),
        (["--compare", "a=", "data=cifar10"], "names no encoder"),
        (["--compare", "--layers", "a=x", "data=cifar10"], "give one of --compare and --layers"),
        (["--compare", "data=cifar10"], "no encoder given"),
        (["x", "data=cifar10", "--frobnicate"], "unknown option '--frobnicate'"),
        (["x", "data=cifar10", "paper.epoch=1"], "did you mean 'paper.epochs'"),
        (["x", "data=cifar10", "--probe", "knn"], "write probe=VALUE"),
        (["x", "data=cifar10", "prob=knn"], "did you mean 'probe'"),
        (["x", "data=cifar10", "alphas=0,1"], "alphas is for --interpolate"),
        (["--layers", "x", "layer=2", "data=cifar10"], "layer is 2 but --layers probes all"),
        (["x", "data=cifar10", f"output={__file__}"], "which is a file; give a folder"),
        (["x", "data=cifar1"], "did you mean 'cifar10'"),
        (["x", "data=cifar10", "seeds=a"], "seeds"),
        (["--interpolate", "x", "data=cifar10"], "takes one ENCODER and base=FULL_MODEL"),
        (["--interpolate", "x", "base=y", "alphas=a", "data=cifar10"], "alphas is 'a'"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in failure(capsys, "probe", *argv)


def test_an_encoder_in_a_folder_with_any_name(
    backbone_folders: dict[str, Path], options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "lr=0.1"
    folder.symlink_to(backbone_folders["siglip"])
    main(["probe", str(folder), "probe=knn", *options])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(content["results"]) == {"lr=0.1"}


def test_a_folder_without_an_encoder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str]
) -> None:
    assert "no config.json" in failure(capsys, "--quiet", "probe", str(tmp_path), *options)
