"""What `hive-vision data` prints: a summary of the data, samples token by token, and its speed."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

EXAMPLES = 5
STYLES = {"learned": "bold green", "read": "dim", "padding": "dim red"}
FEW = 3  # so many equal tokens in a row are still written out
MUCH_LARGER = 1.25  # images that are worth resizing once, by their shorter side


def data_table(summary: Mapping[str, Any]) -> Table:
    """Put training and held-out data side by side.

    Args:
        summary: What ``verify_data`` gives.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    parts = [summary["train"], summary["held_out"]]
    for heading in ("train", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)
    limit = parts[0]["max_text_tokens"]
    rows = {
        "images": [f"{part['images']:,}" for part in parts],
        "captions": [f"{part['captions']:,}" for part in parts],
        "captions that can be used": [f"{part['usable_captions']:,}" for part in parts],
        "images that cannot be used": [f"{part['unusable_images']:,}" for part in parts],
        "empty captions": [f"{part['empty_captions']:,}" for part in parts],
        "image size: smallest": [_size(part, "smallest") for part in parts],
        "            median": [_size(part, "median") for part in parts],
        "            largest": [_size(part, "largest") for part in parts],
        "caption tokens: median": [_tokens(part, "median") for part in parts],
        "                95% have at most": [_tokens(part, "percentile_95") for part in parts],
        "                longest": [_tokens(part, "longest") for part in parts],
        f"                cut at {limit}": [
            f"{part['cut_captions']:,} ({part['cut_share']:.1%})" for part in parts
        ],
        "repeated images": [f"{part['duplicate_images']:,}" for part in parts],
        "repeated image with caption": [f"{part['duplicate_pairs']:,}" for part in parts],
        "images that are in train too": ["", f"{summary['held_out_images_in_train']:,}"],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def problem_lines(problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the first samples that cannot be used."""
    lines = [
        f"  {problem['source']}: {problem['image']}: {problem['reason']}"
        for problem in problems[:EXAMPLES]
    ]
    if len(problems) > EXAMPLES:
        lines.append(f"  ... and {len(problems) - EXAMPLES:,} more")
    return lines


def token_line(tokens: Sequence[tuple[str, str]], colour: bool) -> Text:
    """Write tokens one after another; long runs of the same one are counted.

    Args:
        tokens: Text and use (learned, read, padding) of each.
        colour: Say the use with colours; else learned tokens stand in brackets.
    """
    line = Text()
    for (text, use), run in groupby(tokens):
        count = len(list(run))
        shown = f"[{text}]" if use == "learned" and not colour else text
        words = [f"{shown} x{count}"] if count > FEW else [shown] * count
        for word in words:
            line.append(word, STYLES[use] if colour else "")
            line.append(" ")
    line.rstrip()
    return line


def share_line(tokens: Sequence[tuple[str, str]]) -> str:
    """Say how many of some tokens are learned, read and padding."""
    counts = {use: sum(own == use for _, own in tokens) for use in STYLES}
    total = max(1, len(tokens))
    return f"{len(tokens)} tokens: " + ", ".join(
        f"{count} {use} ({count / total:.0%})" for use, count in counts.items()
    )


def speed_table(bench: Mapping[str, Any]) -> Table:
    """Say what each number of workers gives.

    Args:
        bench: What ``bench_data`` gives.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    stages = [stage["name"] for stage in bench["stages"] if stage["per_second"]]
    for heading in ("workers", f"{bench['unit']} a second", *(f"times {s}" for s in stages)):
        table.add_column(heading, justify="right", no_wrap=True)
    for workers, rate in bench["rates"].items():
        needs = [stage["per_second"] for stage in bench["stages"] if stage["per_second"]]
        own = " (recipe)" if workers == bench["num_workers"] else ""
        table.add_row(f"{workers}{own}", f"{rate:,.0f}", *(f"{rate / n:.2f}" for n in needs))
    return table


def speed_lines(bench: Mapping[str, Any]) -> list[str]:
    """Say where the time goes, what each stage takes, and what to do.

    Args:
        bench: What ``bench_data`` gives.
    """
    shares = ", ".join(f"{name} {share:.0%}" for name, share in bench["shares"].items())
    lines = [f"time without workers: {shares}"]
    for stage in bench["stages"]:
        if stage["per_second"] is None:
            lines.append(f"{stage['name']}: what it takes is known after a run")
            continue
        count = stage["workers"]
        workers = "1 worker is" if count == 1 else f"{count or 'no'} workers are"
        enough = f"about {workers} needed" if stage["is_estimate"] else f"{workers} enough"
        takes = f"{stage['per_second']:,.0f} {bench['unit']} a second ({stage['source']})"
        lines.append(f"{stage['name']} takes {takes}: {enough}")
    return [*lines, _verdict(bench)]


def _verdict(bench: Mapping[str, Any]) -> str:
    """Say whether the loader is the bottleneck, and what helps."""
    known = [stage for stage in bench["stages"] if stage["per_second"]]
    given = f"{bench['key']}={bench['num_workers']}"
    if not known:
        best = max(bench["rates"].values())
        return f"The loader gives up to {best:,.0f} {bench['unit']} a second; run, and ask again."
    fastest = max(known, key=lambda stage: float(stage["per_second"]))
    rate, takes = bench["rates"][bench["num_workers"]], fastest["per_second"]
    found = f"{given} gives {rate / takes:.1f} times what {fastest['name']} takes"
    if bench["num_workers"] == 0:  # images are read while the device waits
        found = f"{given} takes about {takes / (takes + rate):.0%} of the time of {fastest['name']}"
    if fastest["is_enough"]:
        return f"The loader is not the bottleneck: {found}."
    advice = f"set {bench['key']}={fastest['workers']}"
    if fastest["is_estimate"] and fastest["workers"] > bench["processors"]:
        advice += f" on a machine with as many processors (here: {bench['processors']})"
    image, resized = bench["image_side"], bench["resized_to"]
    if image and resized and image > MUCH_LARGER * resized:
        advice += (
            f", or build shards with hive-vision data build ... resize={resized}: the shorter side "
            f"of the images has {image} pixels"
        )
    return f"The loader is the bottleneck: {found}; {advice}."


def _size(part: Mapping[str, Any], name: str) -> str:
    if part["image_size"] is None:
        return "-"
    width, height = part["image_size"][name]
    return f"{width} x {height}"


def _tokens(part: Mapping[str, Any], name: str) -> str:
    return "-" if part["caption_tokens"] is None else str(part["caption_tokens"][name])
