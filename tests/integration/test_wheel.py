"""What an installed package has beyond its modules."""

import tomllib
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_recipes_templates_and_type_marker_lie_inside_the_package():
    package = files("hive_vision")
    assert (package / "py.typed").is_file()
    assert (package / "recipes" / "miniature.yaml").is_file()
    assert (package / "reporting" / "templates" / "report.html").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/hive_vision"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_versions_are_pinned_by_name_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or line.count("==") == 1, line
        assert "/" not in line or line.startswith("#"), line
