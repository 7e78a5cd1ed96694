"""Tables for the terminal, and grids of cells that are drawn or written in any form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """A text, and whether it stands out."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """A table that is drawn in a terminal or written as Markdown.

    Attributes:
        headings: Of the columns; the first column names the rows.
        rows: Cells, one for each heading.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_rich(self) -> Table:
        """Draw it."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*(Text(cell.text, "bold" if cell.bold else "") for cell in row))
        return table

    def to_markdown(self, is_numeric: bool = True) -> str:
        """Write it.

        Args:
            is_numeric: Whether columns after the first are numbers, which stand to the right.
        """
        lines = ["| " + " | ".join(self.headings) + " |"]
        other = "|---:" if is_numeric else "|---"
        lines.append("|---" + other * (len(self.headings) - 1) + "|")
        for row in self.rows:
            texts = (cell.text.replace("|", "\\|") for cell in row)
            cells = (f"**{t}**" if cell.bold else t for t, cell in zip(texts, row, strict=True))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def side_by_side(grid: Grid) -> Grid:
    """Give differences of two methods a row and each test a column, instead of a row for each.

    Args:
        grid: Of three columns: test, the two methods, their difference.
    """
    tests = list(dict.fromkeys(test.text for test, _, _ in grid.rows))
    by_pair: dict[str, dict[str, Cell]] = {}
    for test, pair, difference in grid.rows:
        by_pair.setdefault(pair.text, {})[test.text] = difference
    rows = [
        [Cell(pair), *(by_test.get(test, Cell(MISSING)) for test in tests)]
        for pair, by_test in by_pair.items()
    ]
    return Grid([grid.headings[0], *tests], rows)


def method_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Put the methods of a demo side by side.

    Args:
        results: For each method its ``results.json``.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for heading in (
        "held-out\ncaption\nloss",
        "with\nimages\nshuffled",
        "trained\nparameters",
        "seconds\nper step",
        "peak\nmemory",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        stages = result["stages"]
        shuffled = result.get("held_out_loss_shuffled_images")
        table.add_row(
            result["method"],
            f"{result['held_out_loss']:.3f}",
            MISSING if shuffled is None else f"{shuffled:.3f}",
            f"{result['trained_parameters']:,}",
            "/".join(f"{stage['seconds_per_step']:.2f}" for stage in stages) or MISSING,
            f"{result['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    return table


def resume_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Show what an interrupted run has in common with an undisturbed one.

    Args:
        stages: For each stage its name, ``losses_equal``, ``weights_equal``,
            ``largest_difference`` and the ``weight`` that has it.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("losses equal", "weights equal", "largest difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("in weight")
    for stage in stages:
        table.add_row(
            stage["name"],
            "yes" if stage["losses_equal"] else "NO",
            "yes" if stage["weights_equal"] else "NO",
            f"{stage['largest_difference']:.3g}",
            stage["weight"] or MISSING,
        )
    return table
