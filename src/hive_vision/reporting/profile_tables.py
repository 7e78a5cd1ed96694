"""What a profile says: tables, figure, and the paper's Tables 6 to 9 beside it."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from hive_vision.reporting.figures import colour_of, marker_of
from hive_vision.reporting.tables import MISSING, Cell, Grid

# What the paper reports of HIVE against self-attention: Tables 6, 8 and 9.
PAPER_FLOPS, PAPER_SPEED, PAPER_MEMORY = 0.14, 240 / 70, 22.03 / 54.2

Stages = Sequence[Mapping[str, Any]]


def profile_report(profile: Mapping[str, Any]) -> tuple[str, list[Grid]]:
    """Write a profile as tables, with what they mean.

    Args:
        profile: What ``studies.profile.profile`` returned.
    """
    grids = [_components(stage) for stage in profile["stages"]]
    is_measured = all("seconds" in m for s in profile["stages"] for m in s["methods"].values())
    if is_measured:
        grids.append(_measured(profile["stages"], profile["loading"], profile["batch"]))
    grids += [_ratios(profile["stages"]), _formulas(profile["formulas"])]
    if profile["scaling"]:
        grids.append(_scaling(profile["scaling"]))
    return "\n".join(_sentences(profile, is_measured)), grids


def _components(stage: Mapping[str, Any]) -> Grid:
    """GFLOP of a caption by component, forward + backward."""
    methods = stage["methods"]
    names: dict[str, None] = {}
    for method in methods.values():
        names |= dict.fromkeys(method["flops"])
    rows = [
        [Cell(name), *(Cell(_both(method["flops"].get(name))) for method in methods.values())]
        for name in names
    ]
    totals = [f"{method['flops_per_caption'] / 1e9:.4g}" for method in methods.values()]
    rows.append([Cell("all"), *map(Cell, totals)])
    return Grid([f"{stage['name']}: GFLOP per caption, forward + backward", *methods], rows)


def _both(flops: Mapping[str, float] | None) -> str:
    if flops is None:
        return MISSING
    return f"{flops['forward'] / 1e9:.3g} + {flops['backward'] / 1e9:.3g}"


def _measured(stages: Stages, loading: float | None, batch: int) -> Grid:
    headings = [
        *("measured", "s per step", "from - to", "forward", "backward", "optimizer"),
        *("loading", "of ceiling", "GiB (predicted)", "torch's count"),
    ]
    rows = []
    for stage in stages:
        for method, found in stage["methods"].items():
            middle, low, high = found["seconds_spread"]
            parts = found["parts"]
            counted = found["counted_by_torch"] / found["flops_per_caption"] - 1
            texts = [
                f"{stage['name']} {method}",
                f"{middle:.3g}",
                f"{low:.3g} - {high:.3g}",
                *(f"{parts[part]:.3g}" for part in ("forward", "backward", "optimizer")),
                _loading_share(loading, batch, middle),
                f"{found['share_of_ceiling'][0]:.0%}",
                f"{found['memory'] / 2**30:.2f} ({found['predicted_memory'] / 2**30:.2f})",
                f"{counted:+.1%}",
            ]
            rows.append([Cell(text) for text in texts])
    return Grid(headings, rows)


def _loading_share(loading: float | None, batch: int, step: float) -> str:
    return MISSING if loading is None else f"{batch * loading / (batch * loading + step):.0%}"


def _ratios(stages: Stages) -> Grid:
    """Of hive to sa; the last row is the paper's."""
    headings = ["hive against sa", "FLOPs", "FLOPs beside the encoder", "times faster", "memory"]
    rows = []
    for stage in stages:
        methods = stage["methods"]
        if not {"sa", "hive"} <= methods.keys():
            continue
        hive, sa = methods["hive"], methods["sa"]
        speed = memory = MISSING
        if "seconds" in hive and "seconds" in sa:
            ratios = _speed_ratios(sa, hive)
            speed = f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            memory = f"{hive['memory'] / sa['memory']:.2f}"
        texts = [
            stage["name"],
            f"{hive['flops_per_caption'] / sa['flops_per_caption']:.2f}",
            f"{hive['flops_beside_vision'] / sa['flops_beside_vision']:.2f}",
            *(speed, memory),
        ]
        rows.append([Cell(text) for text in texts])
    paper = [PAPER_FLOPS, PAPER_FLOPS, PAPER_SPEED, PAPER_MEMORY]
    rows.append([Cell("paper's tables 6, 8, 9"), *(Cell(f"{number:.2f}") for number in paper)])
    return Grid(headings, rows)


def _speed_ratios(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> list[float]:
    """One for each turn, whose two measurements stand next to each other."""
    return [s / f for s, f in zip(slow["seconds"], fast["seconds"], strict=True)]


def _formulas(formulas: Mapping[str, float]) -> Grid:
    whole = formulas["self_attention"]
    texts = [
        ("self-attention: L_l N^2 d / 2 + L_l N d^2 (eqs. 2, 4)", "self_attention"),
        ("hive: L_l L_s d^2 + L_l N_t d^2 (eqs. 3, 5)", "hive"),
        ("hive, image tokens where they are attended to", "hive_with_image_tokens"),
    ]
    rows = [
        [Cell(text), Cell(f"{formulas[key]:.3g}"), Cell(f"{formulas[key] / whole:.3f}")]
        for text, key in texts
    ]
    return Grid(["complexity (Table 7)", "value", "of self-attention"], rows)


def _scaling(points: Sequence[Mapping[str, Any]]) -> Grid:
    headings = ["image tokens", "text tokens", "sa GFLOP", "hive GFLOP", "hive / sa"]
    rows = []
    for point in sorted(points, key=lambda p: (p["image_tokens"], p["text_tokens"])):
        sa, hive = (point["flops"].get(method) for method in ("sa", "hive"))
        texts = [str(point["image_tokens"]), str(point["text_tokens"])]
        texts += [MISSING if flops is None else f"{flops / 1e9:.4g}" for flops in (sa, hive)]
        texts.append(f"{hive / sa:.2f}" if sa and hive else MISSING)
        rows.append([Cell(text) for text in texts])
    return Grid(headings, rows)


def scaling_figure(profile: Mapping[str, Any]) -> Figure:
    """Draw operations against image tokens and against text length, sa and hive.

    Args:
        profile: With ``scaling``.
    """
    points, tokens = profile["scaling"], profile["tokens"]
    own = profile["formulas"]["image_tokens"]
    figure = Figure(figsize=(9.8, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, axis, chosen in (
        (left, "image_tokens", [p for p in points if p["text_tokens"] == tokens]),
        (right, "text_tokens", [p for p in points if p["image_tokens"] == own]),
    ):
        chosen = sorted(chosen, key=lambda point: float(point[axis]))
        for method in chosen[0]["flops"] if chosen else ():
            for key, style, label in (
                ("flops", "-", method),
                ("beside_vision", ":", f"{method}, without the encoder"),
            ):
                axes.plot(
                    [point[axis] for point in chosen],
                    [point[key][method] / 1e9 for point in chosen],
                    style,
                    color=colour_of(method, 0),
                    marker=marker_of(method, 0),
                    markersize=4,
                    label=label,
                )
        axes.set_xlabel(axis.replace("_", " "))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    left.set_ylabel("GFLOP per caption")
    left.legend(frameon=False, fontsize="small")
    left.set_title(f"{tokens} text tokens", fontsize="medium")
    right.set_title(f"{own} image tokens", fontsize="medium")
    stage = profile["stages"][-1]["name"]
    figure.suptitle(f"{stage} of {profile['vision']} + {profile['language']}", fontsize="small")
    return figure


def _sentences(profile: Mapping[str, Any], is_measured: bool) -> list[str]:
    stages = profile["stages"]
    yes = [s for s in stages if {"sa", "hive"} <= s["methods"].keys()]
    lines = [
        f"{profile['vision']} + {profile['language']}, random weights, {profile['batch']} captions "
        f"of {profile['tokens']} tokens ({profile['captions']['source']}), {profile['precision']} "
        f"on {profile['device']}."
    ]
    if is_measured:
        lines.append(
            "Time: median (smallest to largest) of turns in which the methods alternate; share of "
            "ceiling: of the speed of matrix products, measured before each turn. Torch's count: "
            "of its FLOP counter in a real step, against the model's."
        )
        loading = "share of a step that waits for its images where no workers read them"
        if profile["loading"] is None:
            loading = "not measured, the data is not here"
        lines.append(f"Loading: {loading}.")
    if not yes:
        return lines
    for key, words in (("flops_per_caption", "of the whole step"), ("flops_beside_vision", "")):
        shares = [s["methods"]["hive"][key] / s["methods"]["sa"][key] for s in yes]
        words = words or "of everything but the encoder"
        lines.append(f"FLOPs {words}: {min(shares):.2f} to {max(shares):.2f} {_against(shares)}.")
    if is_measured:
        speeds = [median(_speed_ratios(s["methods"]["sa"], s["methods"]["hive"])) for s in yes]
        lines.append(
            f"Time: {min(speeds):.2f} to {max(speeds):.2f} times faster than sa; the paper's "
            f"{PAPER_SPEED:.2f} (Table 8) is of an epoch, whose stage and lengths it does not say."
        )
        memory = [s["methods"]["hive"]["memory"] / s["methods"]["sa"]["memory"] for s in yes]
        lines.append(
            f"Memory: {min(memory):.2f} to {max(memory):.2f} of sa's, weights and optimiser "
            f"included; the paper has 0.8 (Table 6) and {PAPER_MEMORY:.2f} (Table 9), of batches "
            "that it does not say."
        )
    return lines


def _against(shares: Sequence[float]) -> str:
    if min(shares) > PAPER_FLOPS:
        return f"of sa's, more than the paper's {PAPER_FLOPS} (Table 6) in every stage"
    if max(shares) < PAPER_FLOPS:
        return f"of sa's, less than the paper's {PAPER_FLOPS} (Table 6) in every stage"
    return f"of sa's, around the paper's {PAPER_FLOPS} (Table 6): this is what it can have counted"
