"""Attention in bfloat16 on a CPU: PyTorch's fused kernel against plain products, in turns.

    python benchmarks/cpu_attention.py [--rounds 7]

Shapes of the paper's models, 2 samples. CPU seconds of one thread; the ratio is fused over
products: above 1 the products are faster.
"""

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hive_vision.models.cpu_attention import sdpa_or_products

SHAPES = {  # query heads, key heads, queries, keys, causal mask
    "SigLIP-L/16-384": (16, 16, 576, 576, False),
    "cross-attention, 15 tokens": (15, 5, 15, 576, False),
    "cross-attention, 77 tokens": (15, 5, 77, 576, False),
    "sa's language model, 653 tokens": (15, 5, 653, 653, True),
}
WIDTH, BATCH = 64, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        __doc__.splitlines()[0],
        "",
        f"{platform.processor() or platform.machine()}, 1 thread, {versions}; milliseconds, "
        f"{options.rounds} rounds.",
        "",
        "| | fused | products | ratio (from - to) |",
        "|---|---|---|---|",
    ]
    for name, (heads, groups, queries, keys, masked) in SHAPES.items():
        layer = nn.Module()
        layer.num_key_value_groups, layer.is_causal = heads // groups, False
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()[None, None] if masked else None
        shapes = ((heads, queries), (groups, keys), (groups, keys))
        inputs = [
            torch.randn(BATCH, length, n, WIDTH, dtype=torch.bfloat16).transpose(1, 2)
            for n, length in shapes
        ]
        for tensor in inputs:
            tensor.requires_grad_()
        for what in ("forward", "forward and backward"):
            times: dict[str, list[float]] = {"fused": [], "products": []}
            for _ in range(options.rounds + 1):
                for kind, attend in (
                    ("fused", sdpa_attention_forward),
                    ("products", sdpa_or_products),
                ):
                    times[kind].append(run(attend, layer, inputs, mask, what != "forward"))
            fused, products = (values[1:] for values in times.values())  # the first is a warm-up
            ratios = [f / p for f, p in zip(fused, products, strict=True)]
            lines.append(
                f"| {name}: {what} | {1e3 * median(fused):.2f} | {1e3 * median(products):.2f} | "
                f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cpu_attention.md").write_text(text, encoding="utf-8")


def run(
    attend: Callable[..., tuple[Tensor, object]],
    layer: nn.Module,
    inputs: list[Tensor],
    mask: Tensor | None,
    backward: bool,
) -> float:
    started = time.process_time()
    output, _ = attend(layer, *inputs, mask)
    if backward:
        output.sum().backward()
    seconds = time.process_time() - started
    for tensor in inputs:
        tensor.grad = None
    return seconds


if __name__ == "__main__":
    main()
