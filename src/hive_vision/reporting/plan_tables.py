"""The plan of a recipe for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from hive_vision.reporting.tables import MISSING

_MEMORY_PARTS = ("weights", "gradients", "optimizer", "waiting", "activations", "temporaries")


def plan_report(plan: Mapping[str, Any]) -> Iterator[Table | str]:
    """Write a plan as tables and lines.

    Args:
        plan: What ``make_plan`` returned.
    """
    device, captions = plan["device"], plan["captions"]
    yield (
        f"{plan['method']}: {plan['vision']} + {plan['language']}, {plan['precision']} on "
        f"{plan['devices']} x {device['name']}" + (" (fsdp2)" if _sharded(plan) else "")
    )
    parameters = ", ".join(f"{group} {size:,}" for group, size in plan["parameters"].items())
    yield f"parameters: {parameters}"
    yield _stage_table(plan)
    yield _memory_table(plan)
    yield (
        f"Captions: {captions['tokens']:.1f} tokens on average, {captions['longest']} at most "
        f"({captions['source']})."
    )
    measured = [stage for stage in plan["stages"] if stage["measured"] is not None]
    if measured:
        yield _measured_table(measured)
        yield (
            "Measured: three steps of each stage with the longest captions, in a process of their "
            "own. Hours and what fits are corrected by it. Loading of images is not in it."
        )
    else:
        yield (
            f"Time: {device['flops_per_second'] / 1e12:.3g} TFLOP/s x {device['share']:.0%} "
            f"({device['share_reason']}). Loading of images is not in it."
        )
    if device["kind"] == "cuda":
        yield f"Memory: {_gib(device['memory'])} GiB of it are used: {device['memory_reason']}."
    if _sharded(plan):
        yield "Memory with fsdp2 is an estimate: everything divided, plus what is gathered at once."


def _stage_table(plan: Mapping[str, Any]) -> Table:
    table = _table()
    headings = (
        *("trained\nparameters", "steps\n(warmup)", "batch =\nmicro x accum.\nx devices"),
        *("GFLOP\nper\ncaption", "EFLOP", "hours", "fits", "devices\nneeded"),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in plan["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['trained_parameters']:,}",
            f"{stage['steps']} ({stage['warmup_steps']})",
            f"{stage['micro_batch_size']} x {stage['accumulation']} x {plan['devices']}",
            f"{stage['flops_per_caption'] / 1e9:.3g}",
            f"{stage['flops'] / 1e18:.3g}",
            f"{stage['hours']:.3g}",
            "yes" if stage["fits"] else "no",
            str(stage["devices_needed"] or MISSING),
        )
    table.add_row("all", *[""] * 5, f"{plan['hours']:.3g}", "", "")
    return table


def _memory_table(plan: Mapping[str, Any]) -> Table:
    table = _table("GiB on one device")
    table.add_column("micro-\nbatch", justify="right")
    for heading in (*_MEMORY_PARTS, "total"):
        table.add_column(heading.replace("izer", "-\nizer"), justify="right", no_wrap=True)
    for stage in plan["stages"]:
        for name, memory in stage["memory"].items():
            label = stage["name"] + (" checkpointing" if name == "checkpointed" else "")
            rows = [(stage["micro_batch_size"], memory["at_micro_batch"])]
            if memory["largest_micro_batch"] is None:
                rows.append(("none", {}))
            elif memory["largest_micro_batch"] != stage["micro_batch_size"]:
                rows.append((f"{memory['largest_micro_batch']} fit", memory["at_largest"]))
            for micro, sizes in rows:
                cells = [_gib(sizes[p]) if sizes else MISSING for p in (*_MEMORY_PARTS, "total")]
                table.add_row(label, str(micro), *cells)
                label = ""
    return table


def _measured_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("measured (predicted)")
    headings = ("captions\nx tokens", "seconds of a\nmicro-batch", "optimizer\nseconds", "GiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        found = stage["measured"]
        table.add_row(
            stage["name"],
            f"{found['micro_batch']} x {found['tokens']}",
            f"{found['seconds']:.3g} ({found['predicted_seconds']:.3g})",
            f"{found['optimizer_seconds']:.3g}",
            f"{_gib(found['memory'])} ({_gib(found['predicted_memory'])})",
        )
    return table


def _table(first: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    return table


def _sharded(plan: Mapping[str, Any]) -> bool:
    return bool(plan["sharding"] == "fsdp2" and plan["devices"] > 1)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
