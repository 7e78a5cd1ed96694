"""What twice the image tokens cost hive: a step measured against the operations counted.

    python benchmarks/image_tokens.py [--stages 2 3] [--turns 3] [--steps 2] [--batch 2]

SigLIP-L/16 and the shapes of MobileLLM-350M, random weights, captions of 15 tokens, images of 272,
384 and 544 pixels (289, 576 and 1156 image tokens) in turns, each measurement a process of its
own. Forward and backward are compared; the optimizer's time does not depend on images.
"""

import argparse
import platform
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from hive_vision.studies.measured_steps import StepCase, measure_apart
from hive_vision.studies.profile import costs_of
from hive_vision.training.hardware import precision_on, this_device
from hive_vision.training.recipes import load_recipe

SIDES, TOKENS = (272, 384, 544), 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed in a turn, after two others")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    recipe = load_recipe("paper-siglip-l16-384")
    precision = precision_on(this_device(), recipe.precision)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        __doc__.splitlines()[0],
        "",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{versions}, {str(precision).removeprefix('torch.')}; {options.batch} captions, "
        f"{options.turns} turns of {options.steps} steps.",
        "",
        "| stage | image tokens | measured, times (from - to) | operations, times | off by |",
        "|---|---|---|---|---|",
    ]
    for number in options.stages:
        stage = f"stage{number}"
        seconds: dict[int, list[float]] = {side: [] for side in SIDES}
        for turn in range(options.turns):
            for side in SIDES:
                case = StepCase(recipe, stage, options.batch, TOKENS, side, steps=options.steps)
                found = measure_apart(case)
                seconds[side].append(found.forward + found.backward)
                print(f"{stage}, turn {turn + 1}, {side} pixels: {found}", flush=True)
        flops = {
            side: costs_of(recipe, [stage], side)[stage].plain.flops_per_sample(TOKENS)
            for side in SIDES
        }
        for small, large in pairwise(SIDES):
            pairs = zip(seconds[large], seconds[small], strict=True)
            ratios = [more / less for more, less in pairs]
            predicted = flops[large] / flops[small]
            lines.append(
                f"| {stage} | {(small // 16) ** 2} to {(large // 16) ** 2} | {median(ratios):.2f} "
                f"({min(ratios):.2f} - {max(ratios):.2f}) | {predicted:.2f} | "
                f"{median(ratios) / predicted - 1:+.0%} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "image_tokens.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
