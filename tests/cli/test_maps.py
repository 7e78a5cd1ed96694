"""The command ``maps``: what its words mean, and what it prints and writes."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hive_vision.cli import main
from hive_vision.cli.maps import parse
from hive_vision.studies import maps
from hive_vision.studies.map_arguments import MapsArguments
from tests.cli.helpers import failure
from tests.reporting.planted import findings


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a", "b", "c=d", "e", "f"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("e", "f"):
        (tmp_path / "runs" / name / "recipe.yaml").write_text("method: hive")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["maps", "--help"])
    text = capsys.readouterr().out
    keys = ("image", "caption", "data", "masks", "samples", "flow_samples", "heads", "scale")
    assert all(f"--{key} " in text for key in keys)
    assert "output=FOLDER" in text


def test_names_folders_and_settings(runs: Path) -> None:
    models, output, settings = parse(
        [
            *("runs/a", "hive=runs/b", "runs/c=d", "output=out", "tokens=dog,sofa", "layers=2,4"),
            *("--heads=3", "image=x.png", "caption=a dog = a sofa"),
        ]
    )
    assert models == {"a": "runs/a", "hive": "runs/b", "c=d": "runs/c=d"}
    assert output == Path("out")
    assert settings == MapsArguments(
        image="x.png", caption="a dog = a sofa", tokens=["dog", "sofa"], layers=[2, 4], heads=3
    )
    assert parse(["runs/a"])[1:] == (Path("runs/maps"), MapsArguments())
    long = "a red star and " * 60  # longer than a file name can be
    assert parse(["runs/a", "image=x.png", f"caption={long}"])[2].caption == long
    with pytest.raises(ValueError, match="files are called by it, so leave out /"):
        parse(["a/b=runs/a"])


def test_tables_sentences_and_files(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def look(models: dict[str, str], arguments: MapsArguments) -> Any:
        seen.append((models, arguments.tokens))
        return findings(cka={})

    monkeypatch.setattr(maps, "look_inside", look)
    main(["maps", "hive=runs/a", "sa=runs/b", "output=out", "tokens=dog", "heads=max"])
    assert seen == [({"hive": "runs/a", "sa": "runs/b"}, ["dog"])]
    printed = capsys.readouterr().out
    table = (runs / "out" / "table.md").read_text()
    for text in (printed, table):
        words = " ".join(text.split())
        assert "the gradient in hive that it gets in sa" in words
        assert "Do words look at what they name?" in words
    assert (runs / "out" / "results.json").is_file()
    assert (runs / "out" / "attention-0-sa.svg").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=x"], "no model given; give run folders"),
        (["runs/z"], "'runs/z' is no folder"),
        (["runs/a", "x=runs/z"], "'runs/z' is no folder"),
        (["runs/a", "a=runs/b"], "two models are called 'a'; write NAME=RUN"),
        (["runs/a", "--frobnicate"], "unknown option 'frobnicate'; allowed are caption, cka,"),
        (["runs/a", "--head=2"], "unknown option 'head'; did you mean 'heads'?"),
        (
            ["runs/a", "head=mean"],
            "'mean' is no folder; .*unknown key 'head'; did you mean 'heads'",
        ),
        (["runs/a", "--caption", "a b"], 'in the same word: caption="a b"'),
        (["runs/a", "--caption"], 'in the same word: caption="..."'),
        (["runs/a", "heads=first"], "heads is 'first'; allowed are mean, max, or the number"),
        (["runs/a", "stage=stage9"], "stage is 'stage9'; allowed are stage1, stage2, stage3"),
        (["runs/a", "scale=x"], "scale is 'x'; allowed are own, shared"),
        (["runs/a", "output=runs/e"], "holds a run or other results"),
        (["runs/a", "samples=-1"], "samples is -1"),
        (["runs/a", "image=x.png"], "image and caption belong together"),
        (["runs/a"], "'runs/a' holds no model; give a run of hive-vision pretrain"),
        (["runs"], "'runs' is not a run but a folder of 2; .* such as 'runs/e'"),
        (["runs/e"], "'runs/e' is a run that has not finished any stage"),
    ],
)
def test_one_line_for_what_is_wrong(
    runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert re.search(message, failure(capsys, "maps", *words))


def test_what_is_wrong_with_words_is_said_before_anything_is_loaded(runs: Path) -> None:
    """Of which torch alone takes seconds."""
    code = (
        "import sys\nfrom hive_vision.cli.maps import run\n"
        "try:\n    run(['runs/a', 'stage=x'])\n"
        "except ValueError:\n    print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
