"""What is written of what was found."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hive_vision.reporting.map_report import MapStyle, write_maps
from hive_vision.reporting.map_tables import claims
from tests.reporting.planted import HEADS, LAYERS, SAMPLES, TOKENS, findings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("maps") / "new"
    assert write_maps(findings(), output, MapStyle()) == json.loads(
        (output / "results.json").read_text()
    )
    return output


def test_everything_is_written_and_said(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    files = [figure["file"] for figure in results["figures"]]
    assert files == [
        *("gradients-0.png", "attention-0-hive.png", "attention-0-sa.png", "gradient_flow.png"),
        *("attention_numbers.png", "cka.png"),
    ]
    for name in files:
        with Image.open(folder / name) as image:
            assert min(image.size) > 100
        assert (folder / name).with_suffix(".svg").read_text().count("<svg") == 1
    assert all(figure["title"] and figure["note"] for figure in results["figures"])
    assert results["kind"] == "maps"
    assert results["models"]["sa"] == {"folder": "runs/sa"}
    assert results["sentences"] == claims(findings())
    assert [len(table["rows"]) for table in results["tables"]] == [LAYERS, 2]
    assert results["tables"][0]["rows"][0][0]["text"] == "1"
    assert results["weight_updates"]["hive"]["stage3"][-1] == 0.5
    assert results["samples"] == SAMPLES


def test_arrays(folder: Path) -> None:
    found = findings()
    with np.load(folder / "maps-0.npz") as maps:
        assert maps["gradients_sa"].shape == (LAYERS, 4, 5)
        assert np.array_equal(maps["attention_hive"], found.shown[0].attention["hive"].weights)
        assert maps["attention_hive"].shape == (2, HEADS, len(TOKENS), 4, 5)
        assert maps["attention_hive_layers"].tolist() == [2, 4]
        assert tuple(maps["tokens_hive"]) == TOKENS
    with np.load(folder / "gradient_flow.npz") as flows:
        assert np.array_equal(flows["norms_hive"], found.flows["hive"].norms)
        assert flows["agreement_sa"].shape == (5, LAYERS)
    with np.load(folder / "cka.npz") as cka:
        assert {name: cka[name].shape for name in cka} == {
            "base_hive": (LAYERS, LAYERS),
            "hive_sa": (LAYERS, 4),
        }


def test_one_picture_without_numbers(tmp_path: Path) -> None:
    none = findings(flows={}, numbers={}, updates={}, cka={}, images=0)
    results = write_maps(none, tmp_path, MapStyle(heads=2, tokens=["sofa", "dog"], layers=[4]))
    assert len(results["figures"]) == 3
    assert results["tables"] == results["sentences"] == []
    assert not (tmp_path / "cka.npz").exists()


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (
            MapStyle(tokens=["cat"]),
            "hive: tokens has 'cat'; the caption's tokens: <s>, a, dog, on, the",
        ),
        (MapStyle(layers=[3]), r"hive: layers has 3; attention is in layers \[2, 4\]"),
        (MapStyle(heads=4), "hive: heads is 4; the model has heads 1 to 3, or mean or max"),
    ],
)
def test_what_is_not_there_cannot_be_drawn(style: MapStyle, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        write_maps(findings(), tmp_path, style)
    assert "\n" not in str(error.value)


def test_trainings_that_differ_are_said_beside_weight_updates(folder: Path, tmp_path: Path) -> None:
    one, other = "stage3 100 steps at 0.001", "stage3 100 steps at 0.002"
    write_maps(findings(shown=[], encoder_training={"x": one, "y": one}), tmp_path, MapStyle())
    alike = _note(tmp_path)
    assert alike == _note(folder)
    write_maps(findings(shown=[], encoder_training={"x": one, "y": other}), tmp_path, MapStyle())
    assert f"Weight updates are not of the same training (x: {one}, y: {other})" in _note(tmp_path)


def _note(folder: Path) -> str:
    figures = json.loads((folder / "results.json").read_text())["figures"]
    (note,) = [figure["note"] for figure in figures if figure["file"] == "gradient_flow.png"]
    return str(note)
