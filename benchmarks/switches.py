"""What each switch of a recipe does to a training step of hive, in turns with the plain step.

    python benchmarks/switches.py [--turns 3] [--steps 1] [--batch 2]

The recipe paper-siglip-l16-384 with random weights and captions of 15 tokens, the machine's own
precision. Each measurement is a process of its own; what torch.compile takes at the start and the
first two steps are not in the seconds. AdamW alone is timed on the tensors that stage 2 trains. The
tables go to results/switches.md.
"""

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from hive_vision.studies.measured_steps import MeasuredSteps, StepCase, measure_apart
from hive_vision.studies.recipe_model import recipe_model
from hive_vision.training.hardware import precision_on, this_device
from hive_vision.training.recipes import load_recipe
from hive_vision.training.stages import apply_rules

RECIPE, TOKENS = "paper-siglip-l16-384", 15
SWITCHES = [  # stage, override, whether only in bfloat16 it makes a difference
    ("stage2", "keep_freed_memory=false", False),
    ("stage3", "keep_freed_memory=false", False),
    ("stage2", "compile=true", False),
    ("stage3", "gradient_checkpointing=true", False),
    ("stage2", "gradient_checkpointing=true", False),
    ("stage3", "compile=true", False),
    ("stage2", "precision=float32", True),
    ("stage2", "attention=sdpa", True),
]
ADAMW = {"fused": {"fused": True}, "foreach": {"foreach": True}, "a loop": {"foreach": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed in a turn, after two others")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--override", nargs="*", default=[], help="of both sides: key=value")
    parser.add_argument("--switches", nargs="+", help="such as compile=true; all if not given")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = this_device()
    precision = precision_on(device, load_recipe(RECIPE, options.override).precision)
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        __doc__.splitlines()[0],
        "",
        f"{name or platform.machine()}, {torch.get_num_threads()} threads, {versions}, "
        f"{str(precision).removeprefix('torch.')}; {options.batch} captions, {options.turns} turns "
        f"of {options.steps} steps.",
        "",
        "| stage | switch | seconds without | seconds with | with over without (from - to)"
        " | GiB without, with |",
        "|---|---|---|---|---|---|",
    ]
    for stage, switch, only_bfloat16 in SWITCHES:
        if only_bfloat16 and precision == torch.float32:
            continue
        if options.switches and switch not in options.switches:
            continue
        lines.append(row(stage, switch, in_turns(stage, switch, options)))
        write(lines, options.output)
    if not options.switches:
        lines += ["", "| AdamW | seconds (from - to) |", "|---|---|"]
        for name, seconds in time_adamw(device, options.turns).items():
            lines.append(
                f"| {name} | {median(seconds):.3f} ({min(seconds):.3f} - {max(seconds):.3f}) |"
            )
        write(lines, options.output)
    print("\n".join(lines))


def in_turns(
    stage: str, switch: str, options: argparse.Namespace
) -> list[tuple[MeasuredSteps, MeasuredSteps]]:
    cases = [
        StepCase(load_recipe(RECIPE, given), stage, options.batch, TOKENS, steps=options.steps)
        for given in (options.override, [*options.override, switch])
    ]
    pairs = []
    for turn in range(options.turns):
        without, with_it = (measure_apart(case) for case in cases)
        print(f"{stage}, {switch}, turn {turn + 1}: {without}; {with_it}", flush=True)
        pairs.append((without, with_it))
    return pairs


def row(stage: str, switch: str, pairs: list[tuple[MeasuredSteps, MeasuredSteps]]) -> str:
    without, with_it = zip(*pairs, strict=True)
    ratios = [after.seconds / before.seconds for before, after in pairs]
    return (
        f"| {stage} | {switch} | {median(m.seconds for m in without):.2f} | "
        f"{median(m.seconds for m in with_it):.2f} | "
        f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | "
        f"{max(m.memory for m in without) / 2**30:.2f}, "
        f"{max(m.memory for m in with_it) / 2**30:.2f} |"
    )


def time_adamw(device: str, turns: int) -> dict[str, list[float]]:
    recipe = load_recipe(RECIPE)
    model, _, _ = recipe_model(recipe)
    apply_rules(model, recipe.stage2.rules)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [torch.nn.Parameter(torch.zeros(p.shape, device=device)) for p in trained]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    found: dict[str, list[float]] = {name: [] for name in ADAMW}
    for _ in range(turns):
        for name, how in ADAMW.items():
            optimizer = torch.optim.AdamW(weights, **how)
            optimizer.step()  # its states are made
            started = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - started)
    return found


def write(lines: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "switches.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
