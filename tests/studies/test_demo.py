import json

import pytest
import yaml

from hive_vision.cli import main
from hive_vision.data.miniature.build import CLASSIFICATION_SETS
from hive_vision.training.recipes import recipe_path


@pytest.fixture
def tiny_recipe(tmp_path):
    """The debug recipe with everything below the test's folder."""
    text = recipe_path("debug").read_text().replace("runs/", f"{tmp_path}/")
    content = yaml.safe_load(text)
    content["miniature"]["data"]["train_scenes"] = 48
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_demo_compares_the_methods_in_one_table(tiny_recipe, tmp_path, capsys):
    command = ["demo", "--no-cascaded", f"--recipe={tiny_recipe}", f"--output={tmp_path / 'demo'}"]
    main(command)
    table = capsys.readouterr().out
    for method in ("base", "sa", "hive"):
        assert f"\n {method} " in table
    assert "cascaded" not in table
    (heading,) = [line for line in table.splitlines() if "accuracy, %" in line]
    assert heading.split()[2:] == ["base", "sa", "hive"]
    for name in CLASSIFICATION_SETS:
        (row,) = [line for line in table.splitlines() if line.startswith(f" {name} ")]
        assert row.count("±") == 3
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [result["method"] for result in results["methods"]] == ["base", "sa", "hive"]
    base, sa, hive = results["methods"]
    assert base["trained_parameters"] == 0
    assert sa["trained_parameters"] != hive["trained_parameters"] > 0
    assert set(results["probe"]["results"]["hive"]) == set(CLASSIFICATION_SETS)
    page = (tmp_path / "demo" / "report.html").read_text()
    for word in ("stage3: vision_model", "texture", "stage1", "One training run of each method"):
        assert word in page
    assert table.splitlines()[-1] == f"The report: {tmp_path / 'demo' / 'report.html'}"
    assert "## Probes" in (tmp_path / "demo" / "model_card.md").read_text()
    # One process for each method: each has its own peak, and a second demo trains nothing.
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "demo").rglob("*.safetensors")}
    main(command)
    assert capsys.readouterr().out == table
    assert times == {f: f.stat().st_mtime_ns for f in (tmp_path / "demo").rglob("*.safetensors")}


def test_demo_needs_a_miniature(tiny_recipe, capsys):
    content = yaml.safe_load(tiny_recipe.read_text())
    del content["miniature"]
    tiny_recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        main(["demo", f"--recipe={tiny_recipe}"])
    assert "has no miniature section" in capsys.readouterr().err
