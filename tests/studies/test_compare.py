"""The comparison of methods over seeds: what it runs, what it keeps, what it chooses by."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from hive_vision.evaluation.arguments import ProbeArguments
from hive_vision.settings import read_settings
from hive_vision.studies.compare import (
    CompareArguments,
    SearchArguments,
    compare_methods,
)
from hive_vision.studies.plan import make_plan
from hive_vision.training.recipes import load_recipe
from tests.evaluation.helpers import write_colours

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, backbone_folders: dict[str, Path], image_folder: Path
) -> CompareArguments:
    """Three stages of one or two steps on the tests' tiny models."""
    folder = tmp_path_factory.mktemp("study")
    rates = {"projectors": 1e-3, "cross_attentions": 1e-3}
    everything = {**rates, "language_model": 1e-3, "vision_model": 1e-3}
    frozen = {**rates, "language_model": "frozen", "vision_model": "frozen"}
    recipe = {
        "output": str(folder / "unused"),
        "model": {
            "vision": str(backbone_folders["siglip"]),
            "language": str(backbone_folders["llama"]),
        },
        "data": {"train": str(image_folder), "holdout": 0.2},
        "stage1": {"rules": frozen, "max_steps": 0, "batch_size": 4},
        "stage2": {"rules": frozen, "max_steps": 0, "batch_size": 4},
        "stage3": {"rules": everything, "max_steps": 4, "batch_size": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return CompareArguments(
        recipe=str(path),
        output=str(folder / "out"),
        data=[str(write_colours(folder / "colours"))],
        methods=["base", "hive"],
        seeds=[0, 1],
        search=SearchArguments(
            seed=7, candidates={"longer": ["stage3.max_steps=4"], "shorter": ["stage3.max_steps=3"]}
        ),
        probe=ProbeArguments(cache=str(folder / "cache")),
    )


def files(folder: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*.safetensors")}


def test_methods_and_seeds_and_what_is_kept(study: CompareArguments) -> None:
    results, search = compare_methods(study)
    assert list(results) == ["base", "hive"]
    for by_set in results.values():
        result = by_set["colours"]
        assert result.seeds == (0, 1)
        assert result.correct.shape == (2, 24)
    assert set(search) == {"hive"}
    scores = search["hive"]["held_out_accuracy"]
    assert set(scores) == {"longer", "shorter"}
    assert scores[search["hive"]["chosen"]] == max(scores.values())
    # Seeds are runs of their own, and base has nothing but its heads.
    folders = {path.name for path in (Path(study.output) / "runs").iterdir()}
    assert folders == {"base-0", "base-1", "hive-0", "hive-1"}
    # A second call trains nothing and says the same.
    before = files(study.output)
    again, _ = compare_methods(study)
    assert files(study.output) == before
    for method, by_set in results.items():
        np.testing.assert_array_equal(again[method]["colours"].correct, by_set["colours"].correct)
    content = json.loads((Path(study.output) / "results.json").read_text())
    assert content["search"] == search
    (difference,) = content["differences"]["colours"]
    assert (difference["first"], difference["second"]) == ("hive", "base")


def test_equal_flops_pays_for_the_same_operations(study: CompareArguments) -> None:
    output = f"{study.output}-flops"
    equal = {"methods": ["sa", "hive"], "equal_flops": ["sa"], "seeds": [0], "search": None}
    results, search = compare_methods(replace(study, output=output, **equal))
    assert list(results) == ["sa", "hive", "sa_equal_flops"]
    assert search == {}
    recipes = {
        name: load_recipe(Path(output) / "runs" / f"{name}-0" / "recipe.yaml")
        for name in ("hive", "sa_equal_flops")
    }
    plans = {name: make_plan(recipe)["stages"] for name, recipe in recipes.items()}
    for hive, sa in zip(plans["hive"], plans["sa_equal_flops"], strict=True):
        one_step = sa["flops_per_caption"] * sa["batch_size"]
        assert abs(hive["flops"] - sa["flops"]) <= one_step / 2 + 1
        assert sa["steps"] <= hive["steps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "needs data, methods and seeds"),
        ({"equal_flops": ["hive"]}, "equal_flops has 'hive'"),
        ({"seeds": [7]}, r"search\.seed is 7, one of the seeds"),
    ],
)
def test_what_cannot_be_compared(
    study: CompareArguments, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_methods(replace(study, **change))


def test_a_wrong_candidate_is_found_before_anything_runs(study: CompareArguments) -> None:
    search = SearchArguments({"wrong": ["stage3.max_stepps=1"]})
    with pytest.raises(ValueError, match=r"did you mean 'stage3\.max_steps'"):
        compare_methods(replace(study, search=search, output=f"{study.output}-2"))
    assert not Path(f"{study.output}-2").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=str)
def test_studies_are_read(path: Path) -> None:
    settings = read_settings(CompareArguments, path=path, what="study")
    assert settings.search is not None
    for overrides in settings.search.candidates.values():
        load_recipe(settings.recipe, (*settings.overrides, *overrides))
