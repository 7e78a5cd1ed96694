"""Where commands write their results, and tables as they print them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hive_vision.reporting.tables import Grid


def show_report(report: tuple[str, Sequence["Grid"]], output: Path) -> None:
    """Print tables with what they mean, and write them as Markdown.

    Args:
        report: What has to be said, and the tables.
        output: Folder for ``table.md``.
    """
    from rich.console import Console

    from hive_vision.folders import write_text
    from hive_vision.reporting.probe_tables import to_markdown

    note, grids = report
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for grid in grids:
        console.print(grid.to_rich())
    console.print(note)
    write_text(output / "table.md", to_markdown(note, grids))
    console.print(f"written to {output}", soft_wrap=True)


def check_output(output: Path, kind: str | None = None) -> None:
    """Refuse to write over a run, or over results of another kind.

    Args:
        output: Folder that results are to go to.
        kind: What ``results.json`` says of its kind, if it says something.

    Raises:
        ValueError: If they cannot go there.
    """
    from hive_vision.folders import read_json

    if output.exists() and not output.is_dir():
        raise ValueError(f"output is {str(output)!r}, which is a file; give a folder")
    kept = read_json(output / "results.json")
    if (kept is not None and kept.get("kind") != kind) or (output / "recipe.yaml").exists():
        raise ValueError(
            f"output is {str(output)!r}, which holds a run or other results; give a folder of its "
            "own"
        )
