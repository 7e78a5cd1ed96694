"""What images cost on their way to the device: bytes against floats, resized shards against photos.

    python benchmarks/data_feed.py [--images 256] [--rounds 5]

Synthetic photographs of 640 x 480 as JPEG files, and shards of them that `hive-vision data build`
resized to 384; SigLIP's image processor at 384. One process does what a worker does (reads,
decodes, makes a batch, puts it into shared memory), in turns:

- *floats*: the whole image processor in the worker;
- *bytes*: what workers do, without what is left to the device (a row of its own, here on a CPU);
- *bytes, resized shards*: the same from the shards.

Seconds are CPU time of the one process, so other work on the machine counts little.
"""

import argparse
import io
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import SiglipImageProcessor

from hive_vision.data.build import BuildSettings, build_data
from hive_vision.data.images import ImageStore, decode_image
from hive_vision.data.sources import Source, open_source
from hive_vision.models.pixels import SplitProcessor

WIDTH, HEIGHT, SIDE, BATCH, WANTED = 640, 480, 384, 16, 1600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    datasets.disable_progress_bars()
    print(
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers"))
        + f"; {options.images} images of {WIDTH} x {HEIGHT}, {options.rounds} rounds in turns\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        report(measure(*stores(Path(folder), options.images), options.rounds))


def stores(folder: Path, count: int) -> tuple[ImageStore, ImageStore]:
    """The photographs as files, and in resized shards."""
    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        )
        noise = random.normal(0, 6, smooth.shape)  # about 100 kB each, as photographs have
        pixels = (smooth + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.jpg", quality=85)
        rows.append(json.dumps({"file_name": f"{number}.jpg", "caption": "a photograph"}))
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    source = open_source(Source(path=str(photos)))["train"]
    with redirect_stderr(io.StringIO()):
        build_data(source, folder / "built", BuildSettings(resize=SIDE, workers=1))
    return source.images, open_source(Source(path=str(folder / "built")))["train"].images


def measure(
    photos: ImageStore, shards: ImageStore, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """CPU seconds of an image by row of the table, and bytes of a JPEG file."""
    whole = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    split = SplitProcessor(whole)
    assert split.is_split
    some = split(next(batches(photos)))["pixel_values"]

    def work(store: ImageStore, prepare: Callable[..., Any]) -> None:
        for images in batches(store):
            prepare(images, return_tensors="pt")["pixel_values"].share_memory_()

    def decode() -> None:
        for _ in batches(photos):
            pass

    def normalize() -> None:
        for _ in range(len(photos) // BATCH):
            split.normalize({"pixel_values": some})

    rows: dict[str, Callable[[], None]] = {
        "floats": lambda: work(photos, whole),
        "bytes": lambda: work(photos, split),
        "bytes, resized shards": lambda: work(shards, split),
        "only reading and decoding": decode,
        "the device's part, on a CPU": normalize,
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name in list(rows)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            rows[name]()
            seconds[name].append((time.process_time() - started) / len(photos))
    stored = sum(Path(str(photos.read(row)["path"])).stat().st_size for row in range(len(photos)))
    return {name: times[1:] for name, times in seconds.items()}, stored // len(photos)


def batches(store: ImageStore) -> Iterator[list[Image.Image]]:
    for start in range(0, len(store), BATCH):
        rows = range(start, min(start + BATCH, len(store)))
        yield [decode_image(store.read(row)) for row in rows]


def report(measured: tuple[dict[str, list[float]], int]) -> None:
    seconds, stored = measured
    print(
        f"| a worker's work ({stored // 1000} kB a file) | images/s of a core | MB handed over |",
        end="",
    )
    print(f" cores for {WANTED:,} images/s | speed against floats | spread |")
    print("|---|---|---|---|---|---|")
    sizes: dict[str, Any] = {"floats": 4, "bytes": 1, "bytes, resized shards": 1}
    for name, times in seconds.items():
        each = statistics.median(times)
        ratios = [one / other for one, other in zip(seconds["floats"], times, strict=True)]
        megabytes = f"{sizes[name] * 3 * SIDE**2 / 1e6:.2f}" if name in sizes else "-"
        cores = f"{math.ceil(WANTED * each * 10) / 10:.1f}"
        print(
            f"| {name} | {1 / each:.0f} | {megabytes} | {cores} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
