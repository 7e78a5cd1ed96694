"""The comparison of methods over seeds: what it runs, what it keeps, what it chooses by."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from hive_vision.evaluation.arguments import ProbeArguments
from hive_vision.reporting.model_card import to_model_card
from hive_vision.settings import read_settings
from hive_vision.studies.compare import (
    CompareArguments,
    SearchArguments,
    compare_methods,
)
from hive_vision.studies.plan import make_plan
from hive_vision.studies.report import make_report
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
    found = compare_methods(study)
    results, search = found.results, found.search
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
    again = compare_methods(study).results
    assert files(study.output) == before
    for method, by_set in results.items():
        np.testing.assert_array_equal(again[method]["colours"].correct, by_set["colours"].correct)
    content = json.loads((Path(study.output) / "results.json").read_text())
    assert content["search"] == search
    (difference,) = content["differences"]["colours"]
    assert (difference["first"], difference["second"]) == ("hive", "base")
    assert found.layers == content["layers"] == {}


def test_every_layer_of_every_run(study: CompareArguments) -> None:
    found = compare_methods(replace(study, layer_data=study.data))
    layers = found.layers["colours"]
    assert {label: len(results) for label, results in layers.items()} == {"base": 8, "hive": 8}
    for label, results in layers.items():
        assert all(result.seeds == (0, 1) for result in results)
        last = found.results[label]["colours"]
        np.testing.assert_array_equal(results[-1].correct, last.correct)
    content = json.loads((Path(study.output) / "results.json").read_text())
    assert len(content["layers"]["colours"]["hive"]) == 8
    card = to_model_card(make_report([Path(study.output)]))
    for text in (
        "base (2 seeds) and hive (2 seeds)",
        "| colours: layer | base | hive |",
        "2 training",
    ):
        assert text in card


def test_several_runs_at_once_are_the_same_runs(study: CompareArguments, tmp_path: Path) -> None:
    alone = replace(study, methods=["hive"], search=None, output=str(tmp_path / "one"))
    one = compare_methods(alone).results["hive"]["colours"]
    two = compare_methods(replace(alone, output=str(tmp_path / "two"), jobs=2))
    np.testing.assert_array_equal(two.results["hive"]["colours"].correct, one.correct)


def test_runs_of_other_settings_are_not_taken_for_these(study: CompareArguments) -> None:
    compare_methods(study)
    before = files(study.output)
    for changed in (
        replace(study, overrides=["model.layer_density=0.5"]),
        replace(study, search=SearchArguments({"longer": ["stage3.max_steps=5"]}, seed=7)),
    ):
        with pytest.raises(ValueError, match="holds a run of another recipe"):
            compare_methods(changed)
    assert files(study.output) == before


def test_seeds_are_the_runs_also_where_no_head_has_one(study: CompareArguments) -> None:
    knn = replace(study, probe=replace(study.probe, probe="knn"), search=None, methods=["base"])
    result = compare_methods(replace(knn, output=f"{study.output}-knn")).results["base"]["colours"]
    assert result.seeds == (0, 1)


def test_equal_flops_pays_for_the_same_operations(study: CompareArguments) -> None:
    output = f"{study.output}-flops"
    equal = {"methods": ["sa", "hive"], "equal_flops": ["sa"], "seeds": [0], "search": None}
    found = compare_methods(replace(study, output=output, **equal))
    assert list(found.results) == ["sa", "hive", "sa_equal_flops"]
    assert found.search == {}
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
        ({"probe": ProbeArguments(probe="knn")}, "a search needs a probe that holds .* out"),
        ({"probe": ProbeArguments(protocol="paper")}, "a search needs a probe that holds .* out"),
        ({"probe": ProbeArguments(probe="retrieval")}, "judges a whole CLIP or SigLIP"),
        ({"layer_data": ["elsewhere"]}, "layer_data has 'elsewhere'"),
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
