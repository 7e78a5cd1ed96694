from pathlib import Path

import pytest
import yaml

from hive_vision.cli import main
from tests.cli.helpers import failure
from tests.evaluation.helpers import write_colours


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "--help"])
    text = capsys.readouterr().out
    for word in ("STUDY.yaml", "--seeds", "--search", "--equal_flops", "--jobs"):
        assert word in text


def test_a_study_prints_and_writes_its_tables(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    backbone_folders: dict[str, Path],
    image_folder: Path,
) -> None:
    recipe = {
        "output": str(tmp_path / "unused"),
        "model": {
            "vision": str(backbone_folders["siglip"]),
            "language": str(backbone_folders["llama"]),
        },
        "data": {"train": str(image_folder), "holdout": 0.2},
    }
    study = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "output": str(tmp_path / "out"),
        "data": [str(write_colours(tmp_path / "colours"))],
        "methods": ["base"],
        "probe": {"cache": str(tmp_path / "cache")},
    }
    for name, content in (("recipe", recipe), ("study", study)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    main(["--quiet", "compare", str(tmp_path / "study.yaml"), "seeds=[0,1]"])
    text = capsys.readouterr().out
    assert "accuracy, %" in text
    assert "2 seeds" in " ".join(text.split())
    assert (tmp_path / "out" / "table.md").read_text().startswith("| accuracy, % | base |")
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothere.yaml"], "study 'nothere.yaml' does not exist"),
        (["{study}", "seed=1"], "did you mean 'seeds'"),
    ],
)
def test_one_line_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], message: str
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("recipe: debug\noutput: x\ndata: [cifar10]\n")
    argv = [word.format(study=study) for word in argv]
    assert message in failure(capsys, "compare", *argv)
