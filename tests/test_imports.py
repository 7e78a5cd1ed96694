"""Every module can be the first one that is imported: no hidden order, no circle."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hive_vision

SOURCE = Path(hive_vision.__file__).parent

# Imports what does not belong to us once, then each module of ours in a fork of its own.
SCRIPT = """
import json, os, sys, traceback

job = json.loads(sys.stdin.read())
for statement in job["others"]:
    exec(statement)
assert not [name for name in sys.modules if name.startswith("hive_vision")]
failures = {}
for module in job["modules"]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            __import__(module)
        except BaseException:
            os.write(writer, traceback.format_exc(limit=-3).encode()[-4000:])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        failure = file.read()
    os.wait()
    if failure:
        failures[module] = failure
sys.stdout.write(json.dumps(failures))
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def other_imports(path: Path) -> set[str]:
    """The import statements at the top of a file that are not about this package."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        roots = {name.partition(".")[0] for name in names}
        if roots and not roots & {"hive_vision", "__future__"}:
            found.add(ast.unparse(node))
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_module_imports_on_its_own() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    job = {
        "modules": [module_name(path) for path in paths],
        "others": sorted(set().union(*map(other_imports, paths))),
    }
    assert "hive_vision.models.hive" in job["modules"]
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    failures = json.loads(completed.stdout)
    assert not failures, "\n\n".join(f"{name}:\n{text}" for name, text in failures.items())


def test_public_names() -> None:
    for name in hive_vision.__all__:
        assert getattr(hive_vision, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Hive'"):
        hive_vision.Hive  # noqa: B018  reading it is the test
