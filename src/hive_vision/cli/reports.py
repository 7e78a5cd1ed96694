"""Tables as commands print them and write them beside their results."""

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
