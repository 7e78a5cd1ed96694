"""What a training step costs when a frozen encoder's features are read from the disk.

    python benchmarks/feature_cache.py [--rounds 3] [--steps 4] [--layers 6] [--tiny]

Stage 2 (encoder frozen, everything else trained) of two models with random weights: the
miniature's shapes in float32, batches of 64, and SigLIP-L/16 at 384 pixels with some of its 24
layers and a Llama of MobileLLM-350M's width in the precision of this machine, batches of 4. Both
contestants take their batches from a loader in this process, forward, backward and AdamW included,
in turns: one decodes PNG images and encodes them, the other reads features from a memory-mapped
file (in the operating system's memory after the first round, as in a run whose features fit there).
The pass that computes the features is timed apart; "pays after" is in passes over the data.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, SiglipImageProcessor, SiglipVisionConfig

from hive_vision.data.features import FeatureStore
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.training.hardware import precision_on, prepare_model, this_device
from hive_vision.training.recipes import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each contestant in a round")
    parser.add_argument("--layers", type=int, default=6, help="of SigLIP-L's 24 and Llama's 32")
    parser.add_argument("--tiny", action="store_true", help="see that this script works")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = {
        "miniature": Case(shapes(128, 256, 12, 4, 48, 8), language(128, 8, 4), 64, torch.float32),
        f"SigLIP-L/16-384 cut to {options.layers} layers": Case(
            shapes(1024, 4096, options.layers, 16, 384, 16),
            language(960, max(2, 32 * options.layers // 24), 15),
            4,
            precision_on(this_device(), "auto"),
        ),
    }
    if options.tiny:
        cases = {"tiny": Case(shapes(32, 64, 4, 4, 32, 8), language(32, 2, 4), 4, torch.float32)}
    device = this_device()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"hive, stage 2, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{options.rounds} rounds in turns of {options.steps} steps each\n"
    )
    print("| model | plain s/step | cached s/step | ratio | bytes/image | pays after passes |")
    print("|---|---|---|---|---|---|")
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {measure(case, Path(folder), options, device)} |", flush=True)


def measure(case: "Case", folder: Path, options: argparse.Namespace, device: str) -> str:
    bench = Bench(case, folder, options.steps, device)
    for is_cached in (False, True):  # warms up
        bench.run(is_cached)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(options.rounds):
        for is_cached in (False, True) if number % 2 else (True, False):
            seconds[is_cached].append(bench.run(is_cached) / options.steps)
    plain, cached = (statistics.median(seconds[kind]) for kind in (False, True))
    ratios = [one / other for one, other in zip(seconds[False], seconds[True], strict=True)]
    spreads = [f"{min(seconds[kind]):.3f} to {max(seconds[kind]):.3f}" for kind in (False, True)]
    saved = (plain - cached) / case.batch
    pays = f"{bench.pass_seconds / saved:.2f}" if saved > 0 else "never"
    return (
        f"{plain:.3f} ({spreads[0]}) | {cached:.3f} ({spreads[1]}) | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{bench.store.row_bytes:,} | {pays}"
    )


class Case:
    """A model's shapes, how many captions are in a step, and in what it computes."""

    def __init__(
        self, vision: SiglipVisionConfig, text: LlamaConfig, batch: int, precision: torch.dtype
    ) -> None:
        self.vision, self.text, self.batch, self.precision = vision, text, batch, precision


def shapes(
    width: int, inner: int, layers: int, heads: int, size: int, patch: int
) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
    )


def language(width: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32000 if width > 500 else 1000,
        tie_word_embeddings=True,
    )


class Bench:
    """A model, images in files, and their features beside them."""

    def __init__(self, case: Case, folder: Path, steps: int, device: str) -> None:
        self.case, self.folder, self.steps, self.device = case, folder, steps, device
        with torch.device(device):
            self.model = HiveForConditionalGeneration.from_backbones(case.vision, case.text)
        for block in self.model.cross_attentions:  # zero passes no gradient to keys and values
            nn.init.normal_(block.o_proj.weight, std=0.02)
        self.model.vision_model.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        prepare_model(self.model, load_recipe("miniature"))  # the attention that a run has
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        size = {"height": case.vision.image_size, "width": case.vision.image_size}
        self.processor = SiglipImageProcessor(size=size)
        self.count = case.batch * steps
        random = np.random.default_rng(0)
        for number in range(self.count):
            pixels = random.integers(0, 256, (size["height"], size["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        first = self.encode([0])
        dtype = torch.bfloat16 if case.precision == torch.bfloat16 else torch.float32
        self.store = FeatureStore(folder / "features", "", self.count, first.shape[1:], dtype)
        started = time.perf_counter()
        for begin in range(0, self.count, case.batch):
            features = self.encode(list(range(begin, begin + case.batch)))
            self.store.append(features.cpu(), [None] * case.batch)
        self.pass_seconds = (time.perf_counter() - started) / self.count

    def pixels(self, rows: list[int]) -> Tensor:
        images = [Image.open(self.folder / f"{row}.png").convert("RGB") for row in rows]
        pixels: Tensor = self.processor(images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device)

    @torch.no_grad()
    def encode(self, rows: list[int]) -> Tensor:
        with self.autocast():
            return self.model.encode_images(self.pixels(rows))

    def autocast(self) -> Any:
        precision = self.case.precision
        return torch.autocast(self.device, precision, enabled=precision != torch.float32)

    def run(self, is_cached: bool) -> float:
        """Seconds for all steps."""
        self.model.train()
        started = time.perf_counter()
        for begin in range(0, self.count, self.case.batch):
            rows = list(range(begin, begin + self.case.batch))
            if is_cached:
                features = torch.stack([self.store.read(row) for row in rows])
                images = {"encoder_features": features.to(self.device)}
            else:
                images = {"pixel_values": self.pixels(rows)}
            ids = torch.randint(4, 900, (len(rows), 16), device=self.device)
            with self.autocast():
                loss = self.model(**images, input_ids=ids, labels=ids, return_logits=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
