"""A training step of hive against transformers' LLaVA and this package's own sa, in turns.

    python benchmarks/training_step.py [--stages 1 2 3] [--turns 3] [--steps 2] [--batch 2]

SigLIP-L/16 at 384 pixels and the shapes of MobileLLM-350M, random weights, the machine's own
precision. Bar and aim are what was asked for before anything was built, in bfloat16, from trials on
a CPU with AMX. `llava` is `LlavaForConditionalGeneration` in a plain
loop, captions padded to 77 tokens, the loss that the model itself computes. Each measurement is a
process of its own: two models of stage 3 do not fit into 24 GB. All loops have the same AdamW,
clipping, autocast and, on a CPU, memory that is kept from step to step (the recipe's
keep_freed_memory). LLaVA's encoder runs its pooling head, which ours spare. Ratios are medians over
turns, not quotients of medians. The tables go to results/training_step.md.
"""

import argparse
import json
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from hive_vision.analysis.tracing import Trace
from hive_vision.studies.measured_steps import (
    MeasuredSteps,
    StepCase,
    measure_apart,
    time_steps,
    used_memory,
)
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.hardware import keep_freed_memory, precision_on, this_device
from hive_vision.training.recipes import load_recipe

RECIPE, PADDED, DYNAMIC = "paper-siglip-l16-384", 77, 15
CASES = {
    "llava, 77 tokens": ("llava", PADDED),
    "sa, 77": ("sa", PADDED),
    "sa, 15": ("sa", DYNAMIC),
    "hive, 77": ("hive", PADDED),
    "hive, 15": ("hive", DYNAMIC),
}
RATIOS = [  # slow, fast, and for each stage the bar and the aim
    ("llava, 77 tokens", "hive, 15", [(3.6, 4.3), (3.8, 4.6), (2.1, 2.4)]),
    ("sa, 77", "hive, 77", [(2.4, 2.6), (2.4, 2.7), (1.5, 1.7)]),
    ("sa, 15", "hive, 15", None),
    ("llava, 77 tokens", "sa, 77", [(1.0, 1.0)] * 3),
    ("hive, 77", "hive, 15", None),
]
CEILING = [(0.5, 0.6), (0.45, 0.55), (0.45, 0.55)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed in a turn, after two others")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--override", nargs="*", default=[], help="of the recipe: key=value")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    found: dict[str, dict[str, list[MeasuredSteps]]] = {}
    for stage in options.stages:
        of_stage = found.setdefault(f"stage{stage}", {name: [] for name in options.cases})
        for turn in range(options.turns):
            for name in options.cases:
                method, tokens = CASES[name]
                steps = measured(method, f"stage{stage}", tokens, options)
                of_stage[name].append(steps)
                print(f"stage {stage}, turn {turn + 1}, {name}: {steps}", flush=True)
        write(found, options)  # after each: the next stage may not fit into the memory


def write(found: dict[str, dict[str, list[MeasuredSteps]]], options: argparse.Namespace) -> None:
    lines = [__doc__.splitlines()[0], "", environment(options), ""]
    for stage, cases in found.items():
        lines += [*table(stage, cases, options), ""]
    text = "\n".join(lines)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training_step.md").write_text(text, encoding="utf-8")
    raw = {s: {n: [vars(m) for m in ms] for n, ms in c.items()} for s, c in found.items()}
    (options.output / "training_step.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")


def environment(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    given = " ".join(options.override) or "the recipe's defaults"
    precision = precision_on(this_device(), recipe("hive", options.override).precision)
    return (
        f"{device or platform.machine()}, {torch.get_num_threads()} threads, {versions}, "
        f"{str(precision).removeprefix('torch.')}; {options.batch} captions, "
        f"{options.turns} turns of {options.steps} steps, {given}."
    )


def table(
    stage: str, cases: dict[str, list[MeasuredSteps]], options: argparse.Namespace
) -> list[str]:
    number = int(stage[-1]) - 1
    lines = [
        f"| {stage} | seconds (median, from - to) | forward | backward | optimizer | GiB |"
        " of the matrix-product ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, turns in cases.items():
        seconds = [m.seconds for m in turns]
        parts = [median(getattr(m, p) for m in turns) for p in ("forward", "backward", "optimizer")]
        method, tokens = CASES[name]
        share = "-"
        if method != "llava":
            flops = options.batch * trace(method, stage, *options.override).flops_per_sample(tokens)
            share = f"{median(flops / m.seconds / m.speed for m in turns):.0%}"
            if name == "hive, 15":
                share += f" (bar {CEILING[number][0]:.0%}, aim {CEILING[number][1]:.0%})"
        lines.append(
            f"| {name} | {median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f}) | "
            + " | ".join(f"{part:.2f}" for part in parts)
            + f" | {max(m.memory for m in turns) / 2**30:.2f} | {share} |"
        )
    lines += ["", f"| {stage}: times faster | median (from - to) | bar, aim |", "|---|---|---|"]
    for slow, fast, goals in RATIOS:
        if slow in cases and fast in cases:
            pairs = zip(cases[slow], cases[fast], strict=True)
            ratios = [s.seconds / f.seconds for s, f in pairs]
            goal = "" if goals is None else "{}, {}".format(*goals[number])
            lines.append(
                f"| {fast} over {slow} | {median(ratios):.2f} "
                f"({min(ratios):.2f} - {max(ratios):.2f}) | {goal} |"
            )
    return lines


def recipe(method: str, overrides: list[str]) -> PretrainArguments:
    return load_recipe(RECIPE, [f"method={'sa' if method == 'llava' else method}", *overrides])


@cache
def trace(method: str, stage: str, *overrides: str) -> Trace:
    from hive_vision.studies.profile import costs_of

    arguments = recipe(method, list(overrides))
    return costs_of(arguments, [stage])[stage].trace(arguments.gradient_checkpointing)


def measured(method: str, stage: str, tokens: int, options: argparse.Namespace) -> MeasuredSteps:
    arguments = recipe(method, options.override)
    case = StepCase(arguments, stage, options.batch, tokens, steps=options.steps)
    return measure_apart(case, measure_llava if method == "llava" else None)


def measure_llava(case: StepCase) -> MeasuredSteps:
    """What someone writes with transformers alone."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, logging

    from hive_vision.studies.recipe_model import backbone_config

    logging.set_verbosity_error()
    device = this_device()
    before = used_memory(device)
    torch.manual_seed(0)
    vision = backbone_config(case.arguments.model.vision, "vision")
    language = backbone_config(case.arguments.model.language, "language")
    image_token, patches = language.vocab_size - 1, (vision.image_size // vision.patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image_token,
        vision_feature_layer=case.arguments.model.sa_feature_layer,
        vision_feature_select_strategy="full",
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).train()
        ids = torch.randint(3, image_token - 1, (case.batch, patches + case.tokens))
        pixels = torch.randn(case.batch, 3, vision.image_size, vision.image_size)
    ids[:, 1 : 1 + patches] = image_token
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : 1 + patches] = -100
    mask[-1, -1], labels[-1, -1] = 0, -100
    model.model.vision_tower.requires_grad_(case.stage == "stage3")
    model.model.language_model.requires_grad_(case.stage != "stage1")
    model.lm_head.requires_grad_(case.stage != "stage1")
    if device == "cpu" and case.arguments.keep_freed_memory:
        keep_freed_memory()

    def loss() -> torch.Tensor:
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        return model(**batch, labels=labels).loss

    precision = precision_on(device, case.arguments.precision)
    return time_steps(model, loss, precision, case, before)


if __name__ == "__main__":
    main()
