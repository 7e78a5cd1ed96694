"""What a caption costs when an image is encoded once for its five captions (data.group_captions).

    python benchmarks/captions_per_image.py [--rounds 3] [--method hive]

The recipe paper-siglip-l16-384 with random weights, stage 2 (encoder frozen, everything else
trained), the precision of this machine: the forward and backward pass of ten
captions of two images against ten captions with an image each, in turns. The optimiser's step,
which is the same for both and paid once for a whole batch, is left out, as is reading images.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hive_vision.studies.measured_steps import now
from hive_vision.studies.recipe_model import recipe_model
from hive_vision.training.hardware import precision_on, prepare_model, this_device
from hive_vision.training.recipes import load_recipe
from hive_vision.training.stages import apply_rules

CAPTIONS, EACH, TOKENS = 10, 5, 16  # TOKENS: what captions of 15 are padded to in length buckets
PREDICTED = 3.9  # time per caption, stage 2 of hive on an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=("hive", "cascaded", "sa"), default="hive")
    options = parser.parse_args()
    device = this_device()
    torch.manual_seed(0)
    model = build(options.method, device)
    contestants = {
        "an image each": batch_of(model, options.method, 1, device),
        f"{EACH} captions an image": batch_of(model, options.method, EACH, device),
    }
    names = list(contestants)
    operations = {}
    for name, batch in contestants.items():  # warms up, too
        with FlopCounterMode(display=False) as counter:
            step(model, batch)
        operations[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names[:: 1 if number % 2 else -1]:
            took = timed(lambda name=name: step(model, contestants[name]))
            seconds[name].append(took / CAPTIONS)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{options.method}, {where}, {torch.get_num_threads()} threads, {versions}; "
        f"{options.rounds} rounds in turns, {CAPTIONS} captions of {TOKENS} tokens\n"
    )
    print("| captions have | images | seconds a caption | spread | TFLOP a caption |")
    print("|---|---|---|---|---|")
    for name, times in seconds.items():
        print(
            f"| {name} | {len(contestants[name]['pixel_values'])} | {statistics.median(times):.3f} "
            f"| {min(times):.3f} to {max(times):.3f} | {operations[name] / CAPTIONS / 1e12:.3f} |"
        )
    ratios = [one / five for one, five in zip(*seconds.values(), strict=True)]
    counted = operations[names[0]] / operations[names[1]]
    print(
        f"\ntime per caption, ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); operations: {counted:.2f}; predicted for an H200: {PREDICTED}"
    )


def build(method: str, device: str) -> PreTrainedModel:
    """Stage 2: the encoder is frozen."""
    recipe = load_recipe("paper-siglip-l16-384", [f"method={method}"])
    model, _, _ = recipe_model(recipe, device)
    apply_rules(model, recipe.stage2.rules)
    prepare_model(model, recipe)
    return model.train()


def batch_of(model: PreTrainedModel, method: str, each: int, device: str) -> dict[str, Tensor]:
    """Ten captions; ``each`` of them share an image."""
    images = CAPTIONS // each
    placeholders = model.config.image_seq_length if method == "sa" else 0
    ids = torch.randint(4, 31000, (CAPTIONS, TOKENS))
    if placeholders:
        image_token = model.config.image_token_index
        ids = torch.cat([torch.full((CAPTIONS, placeholders), image_token), ids], dim=1)
    labels = ids.clone()
    labels[:, : placeholders + 1] = -100
    batch = {
        "pixel_values": torch.randn(images, 3, 384, 384),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }
    if each > 1:
        batch["image_index"] = torch.arange(images).repeat_interleave(each)
    return {name: value.to(device) for name, value in batch.items()}


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    model.zero_grad()
    device = batch["input_ids"].device.type
    precision = precision_on(device, "auto")
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        loss = model(**batch, return_logits=False).loss
    loss.backward()


def timed(function: Callable[[], None]) -> float:
    started = now()
    function()
    return now() - started


if __name__ == "__main__":
    main()
