"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

MISSING = "-"


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
