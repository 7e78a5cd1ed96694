"""Throughput of feature extraction against the encoder's bare forward pass, on the same images.

    python benchmarks/feature_extraction.py [--rounds 5]

Bare: preprocessed batches that lie in memory go through the encoder, nothing else. Extraction:
stored JPEGs are decoded, preprocessed, encoded, pooled and written to the cache. In turns, in one
process; the encoder has random weights, which cost the same.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from hive_vision.data.classification import LabelledImages
from hive_vision.data.images import ColumnImages
from hive_vision.evaluation.features import FrozenEncoder, Reading, read_features

# Width, blocks, image size, patch size, images, batch.
SIZES = {
    "ViT-S/16 at 224": (384, 12, 224, 16, 128, 32),
    "ViT-B/16 at 224": (768, 12, 224, 16, 64, 16),
    "miniature (12 x 96 at 48)": (96, 12, 48, 8, 1024, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, {rounds} rounds in turns\n")
    print("| encoder | extraction, images/s | bare forward, images/s | ratio | spread |")
    print("|---|---|---|---|---|")
    for name, size in SIZES.items():
        ratios, speeds = measure(*size, rounds)
        bare, extraction = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(
            f"| {name} | {extraction:.1f} | {bare:.1f} | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} |",
            flush=True,
        )
    print("\nread a second time: no forward pass (a test holds that)")


def measure(
    width: int, blocks: int, size: int, patch: int, count: int, batch: int, rounds: int
) -> tuple[list[float], list[tuple[float, float]]]:
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width if width > 96 else 2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(4, width // 64),
        image_size=size,
        patch_size=patch,
    )
    processor = SiglipImageProcessor(size={"height": size, "width": size})
    encoder = FrozenEncoder("bench", SiglipVisionModel(config), processor)
    images = stored_images(count, size)
    prepared = [
        encoder.image_processor(
            [images[row] for row in range(start, min(start + batch, count))], return_tensors="pt"
        )["pixel_values"].to(encoder.device)
        for start in range(0, count, batch)
    ]
    ratios, speeds = [], []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        with torch.no_grad():
            for pixels in prepared:
                encoder.model(pixel_values=pixels)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        bare = count / (time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            read_features(encoder, images, [Reading(blocks)], Path(folder) / "cache", batch)
            extraction = count / (time.perf_counter() - started)
        ratios.append(extraction / bare)
        speeds.append((bare, extraction))
    return ratios[1:], speeds[1:]  # the first round warms up


def stored_images(count: int, size: int) -> LabelledImages:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, size // 8, size // 8, 3), dtype=np.uint8)
    rows = []
    for pixels in coarse:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    return LabelledImages("bench", ColumnImages(data, "image", ""), np.arange(count) % 10)


if __name__ == "__main__":
    main()
