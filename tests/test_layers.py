"""The layers of the package: imports point down only, and a few rules for every file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hive_vision

SOURCE = Path(hive_vision.__file__).parent
TESTS = Path(__file__).parent

# From the top down. Those on one line are siblings and never import each other.
LAYERS = (
    ("cli",),
    ("studies",),
    ("reporting",),
    ("training", "evaluation"),
    ("analysis",),
    ("models", "data"),
    ("settings",),
    ("naming", "folders", "conversation"),  # import nothing of ours, anyone may import them
)
RANKS = {part: rank for rank, parts in enumerate(reversed(LAYERS)) for part in parts}
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
INITIAL = {"__init__.py", "__main__.py"}


def part_of(path: Path) -> str:
    """The layer that a file belongs to: its folder, or its own name at the top."""
    return path.parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"), str(path))


def imported_parts(path: Path, content: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and layers of all imports of our own, those inside functions included."""
    package = ["hive_vision", *path.parent.parts]
    for node in ast.walk(content):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *inside = name.split(".")
            if root == "hive_vision":
                yield node.lineno, inside[0] if inside else ""


def violations(path: Path, content: ast.Module) -> list[str]:
    own = part_of(path)
    found = []
    for line, other in imported_parts(path, content):
        if other not in RANKS:
            found.append(f"{path}:{line} imports {other or 'the package'!r}, which is in no layer")
        elif other != own and RANKS[other] >= RANKS[own]:
            found.append(f"{path}:{line}: {own} may not import {other}")
    return found


LAYERED = [path for path in MODULES if str(path) not in INITIAL and part_of(path) != "recipes"]


@pytest.mark.parametrize("path", LAYERED, ids=str)
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in RANKS, f"{path} is in no layer of {LAYERS}"
    assert violations(path, tree(path)) == []


def test_every_layer_is_a_part_of_the_package() -> None:
    assert {part_of(path) for path in LAYERED} <= set(RANKS)
    assert not list((SOURCE / "recipes").rglob("[!_]*.py")), "recipes are data, not code"


@pytest.mark.parametrize(
    ("path", "line", "allowed"),
    [
        ("models/a.py", "from hive_vision.data.b import c", False),
        ("data/a.py", "import hive_vision.models.b", False),
        ("data/a.py", "from ..models import b", False),
        ("data/miniature/a.py", "from ...models.b import c", False),
        ("data/miniature/a.py", "from ..captions import c", True),
        ("data/miniature/a.py", "from .wording import c", True),
        ("models/a.py", "def f():\n    from hive_vision.training import b", False),
        ("training/a.py", "from hive_vision.evaluation.b import c", False),
        ("evaluation/a.py", "from hive_vision import training", False),
        ("analysis/a.py", "from hive_vision import load_recipe", False),
        ("training/a.py", "import hive_vision", False),
        ("reporting/a.py", "from hive_vision.studies.b import c", False),
        ("naming.py", "from hive_vision.data.b import c", False),
        ("studies/a.py", "from hive_vision.cli import main", False),
        ("models/a.py", "from hive_vision.naming import unknown_name", True),
        ("training/a.py", "from hive_vision.models.b import c", True),
        ("cli/a.py", "def f():\n    from hive_vision.studies.demo import d", True),
    ],
)
def test_the_rule_itself(path: str, line: str, allowed: bool) -> None:
    assert (violations(Path(path), ast.parse(line)) == []) == allowed


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_house_rules(path: Path) -> None:
    for node in ast.walk(tree(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{where}: use logging, or sys.stdout in the cli"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{where}: star import"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"


def test_every_module_has_its_test_file() -> None:
    expected = [path.with_name(f"test_{path.name}") for path in MODULES if path.name not in INITIAL]
    missing = [str(path) for path in expected if not (TESTS / path).is_file()]
    assert not missing, f"missing below {TESTS.name}: {', '.join(missing)}"
