"""Peak memory that `hive-vision plan` predicts against what training allocates, on the miniature.

    python benchmarks/plan_memory.py [--folder runs/plan-memory]

Every case is a process of its own: `HiveTrainer` trains three steps on the CPU under PyTorch's
profiler, whose allocator events are added up. Weights, which lie there before, are added. The
backbones have the miniature's shapes and random weights. The prediction is made for the longest
captions that those steps had.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

METHODS, STAGES, MICRO_BATCHES, BATCH_SIZE = ("hive", "sa"), (1, 2, 3), (8, 32), 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/plan-memory"))
    parser.add_argument("--case", help="one case, as the parent gives it: JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.folder, **json.loads(options.case))))
        return
    print("method stage checkpointing micro-batch  measured MB  predicted MB   ratio")
    worst = 1.0
    for case in cases():
        command = [sys.executable, __file__, "--folder", str(options.folder), "--case"]
        output = subprocess.run(
            [*command, json.dumps(case)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        measured, predicted = json.loads(output.splitlines()[-1])
        ratio = predicted / measured
        worst = max(worst, ratio, 1 / ratio)
        print(
            f"{case['method']:<6} {case['stage']:<5} {case['checkpointing']!s:<13} "
            f"{case['micro']:<11} {measured / 1e6:12.1f} "
            f"{predicted / 1e6:13.1f} {ratio:7.3f}",
            flush=True,
        )
    print(f"largest deviation: {worst - 1:.1%}")


def cases() -> list[dict[str, object]]:
    return [
        {"method": method, "stage": stage, "checkpointing": checkpointing, "micro": micro}
        for method in METHODS
        for stage in STAGES
        for checkpointing in (False, True)
        for micro in MICRO_BATCHES
    ]


def run_case(
    folder: Path, method: str, stage: int, checkpointing: bool, micro: int
) -> tuple[float, float]:
    from hive_vision.analysis.measuring import measure_peak
    from hive_vision.studies.plan import make_plan
    from hive_vision.training.callbacks import InterruptCallback
    from hive_vision.training.foundations import ensure_miniature
    from hive_vision.training.pretrain import Job
    from hive_vision.training.recipes import load_recipe
    from hive_vision.training.run_folder import RunFolder
    from hive_vision.training.stages import apply_rules
    from hive_vision.training.watchdog import Watchdog

    name = f"stage{stage}"
    miniature = folder / "miniature"
    recipe = load_recipe(
        "miniature",
        [
            f"output={folder / f'{method}-{stage}-{checkpointing}-{micro}'}",
            f"miniature.folder={miniature}",
            "miniature.foundations.vision_steps=0",
            "miniature.foundations.language_steps=0",
            "miniature.data.train_scenes=600",
            *(f"model.{part}={miniature}/foundations/{of}" for part, of in PARTS.items()),
            *(f"data.{part}={miniature}/data/captions/{part}" for part in ("train", "validation")),
            f"method={method}",
            *(f"stage{n}.max_steps={3 if n == stage else 0}" for n in STAGES),
            f"{name}.batch_size={BATCH_SIZE}",
            f"micro_batch_size={micro}",
            f"gradient_checkpointing={str(checkpointing).lower()}",
        ],
    )
    assert recipe.miniature is not None
    ensure_miniature(recipe.miniature)
    run = RunFolder(recipe)
    run.create()
    settings = recipe.stages[name]
    longest = []
    with Watchdog(run.path, 0, 1, 0) as watchdog:
        job = Job(recipe, run, watchdog, InterruptCallback(60.0))
        if checkpointing:
            job.model.gradient_checkpointing_enable({"use_reentrant": False})
            job.model.disable_input_require_grads()
        parts = apply_rules(job.model, settings.rules)
        run.stage(name).mkdir(exist_ok=True)
        trainer = job.trainer(name, settings, parts)
        job.model.register_forward_pre_hook(
            lambda module, args, kwargs: longest.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        peak = measure_peak(lambda: trainer.train())
    images = job.model.config.image_seq_length if method == "sa" else 0
    kind = "checkpointed" if checkpointing else "plain"

    def predicted(tokens: int) -> dict[str, float]:
        plan = make_plan(recipe, "cpu", tokens=tokens - images)
        return plan["stages"][0]["memory"][kind]["at_micro_batch"]

    # The first step has no optimiser states yet: the longest caption may not be where the peak is.
    first, rest = longest[: BATCH_SIZE // micro], longest[BATCH_SIZE // micro :]
    start, later = predicted(max(first)), predicted(max(rest))
    expected = max(start["total"] - start["optimizer"], later["total"])
    return peak + start["weights"], expected


PARTS = {"vision": "siglip", "language": "llama"}

if __name__ == "__main__":
    main()
