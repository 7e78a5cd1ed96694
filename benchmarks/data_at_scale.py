"""A set of 200,000 captioned images on two cores: start-up, loader, and memory over an epoch.

    python benchmarks/data_at_scale.py [--folder runs/data-at-scale] [--images 200000]

Images are JPEG files of 256 x 256 pixels with the size of photographs, built into tar shards by
`hive-vision data build`; models are tiny, so that the loader has to keep up. Everything below the
folder is made once (15 GB) and can be deleted afterwards.

- *start-up*: from a fresh process to the first batch, without and with stored token ids; imports
  apart.
- *loader*: images a second that two workers give, against two workers that do nothing but read
  the same bytes at known places and decode them (and, in the second pair, hand them to the
  same image processor). Pairs are interleaved.
- *memory*: resident memory of a training run and its workers, added up, over an epoch.
"""

import argparse
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

SIDE, DISTINCT, BATCH, WORKERS = 256, 500, 64, 2
PAIRS, PAIR_STEPS = 7, 100
WORDS = [
    *("a", "an", "the", "large", "small", "red", "green", "blue", "yellow", "striped", "dotted"),
    *("plain", "circle", "square", "triangle", "star", "left", "right", "above", "below", "of"),
    *("and", "with", "on", "background", "cross", "ring", "beside", "digit"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/data-at-scale"))
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--child", choices=["start", "loader"])
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    match options.child:
        case "start":
            print(json.dumps(start(folder)))
        case "loader":
            print(json.dumps(loader(folder)))
        case None:
            make(folder, options.images)
            report(folder, options.images)


def report(folder: Path, images: int) -> None:
    print(f"{images:,} images of {SIDE} x {SIDE} pixels in tar shards, {os.cpu_count()} cores\n")
    for path in (folder / "cache" / "hive-vision").glob("tokens-*"):
        path.unlink()
    print("| start-up, seconds | imports | models and data | first batch | together |")
    print("|---|---|---|---|---|")
    for title in ("token ids are made", "stored token ids", "stored token ids"):
        seconds = child(folder, "start")
        print(f"| {title} | " + " | ".join(f"{s:.1f}" for s in [*seconds, sum(seconds)]) + " |")
    print("\n| images a second | loader | bare | loader / bare | spread |\n|---|---|---|---|---|")
    for title, pairs in child(folder, "loader").items():
        ratios = sorted(ours / bare for ours, bare in pairs)
        ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
        middle = statistics.median(ratios)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)}"
        print(f"| {title} | {ours:.0f} | {bare:.0f} | {middle:.3f} | {spread} |", flush=True)
    if images >= 2000 * BATCH:
        memory(folder, steps=images // BATCH)


def child(folder: Path, name: str) -> Any:
    command = [sys.executable, __file__, "--folder", str(folder), "--child", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def memory(folder: Path, steps: int) -> None:
    """Train for an epoch and follow the memory of all its processes."""
    command = [sys.executable, "-m", "hive_vision", "--offline", "pretrain", "miniature"]
    command += [*recipe_options(folder, "run"), f"stage1.max_steps={steps}", "save_every=500"]
    command += [f"{stage}.max_steps=0" for stage in ("stage2", "stage3")]
    shutil.rmtree(folder / "run", ignore_errors=True)
    log = folder / "run.log"
    with log.open("w") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file)
        resident: dict[int, list[tuple[int, int]]] = {}
        while run.poll() is None:
            step, size = step_of(folder / "run"), resident_bytes(run.pid)
            if 0 < step < steps - 10:  # what follows the last step is not training
                resident.setdefault(step, []).append(size)
            time.sleep(1)
    if run.returncode:
        raise RuntimeError(f"the training run failed, see {log}")
    after = {step: max(sizes) for step, sizes in resident.items() if step >= 1000}
    first, last = after[min(after)], after[max(after)]
    print(f"\n| resident memory of trainer and {WORKERS} workers | step | MB | of it own |")
    print("|---|---|---|---|")
    for title, step in (
        ("after 1,000 steps", min(after)),
        ("at the end", max(after)),
        ("most in between", max(after, key=lambda step: after[step])),
    ):
        both, own = (size / 1e6 for size in after[step])
        print(f"| {title} | {step} | {both:.1f} | {own:.1f} |")
    growth, own = ((b - a) / 1e6 for a, b in zip(first, last, strict=True))
    print(f"\ngrowth after the first 1,000 steps: {growth:+.1f} MB, of it own {own:+.1f} MB")
    print("(not own: pages of memory-mapped files, and batches on their way between processes)")


def step_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def resident_bytes(pid: int) -> tuple[int, int]:
    """Of a process and its children: all, and what is neither a file's nor shared."""
    try:
        process = psutil.Process(pid)
        sizes = [one.memory_info() for one in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0, 0
    return sum(s.rss for s in sizes), sum(s.rss - s.shared for s in sizes)


def make(folder: Path, images: int) -> None:
    """Write the images and have them built into shards."""
    built = folder / f"built-{images}"
    if built.exists():
        return
    import datasets

    source = folder / f"source-{images}"
    if not source.exists():
        features = datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string")}
        )
        rows = datasets.Dataset.from_generator(
            lambda: rows_of(images), features=features, cache_dir=str(folder / "source-cache")
        )
        rows.save_to_disk(source)
    command = [sys.executable, "-m", "hive_vision", "data", "build", str(source), str(built)]
    subprocess.run(command, check=True)


def rows_of(images: int) -> Iterator[dict[str, Any]]:
    words, numbers = random.Random(0), np.random.default_rng(0)
    pool = [jpeg(numbers) for _ in range(DISTINCT)]
    for number in range(images):
        caption = " ".join(words.choices(WORDS, k=words.randint(5, 20)))
        yield {"image": {"path": None, "bytes": pool[number % DISTINCT]}, "caption": caption}


def jpeg(numbers: np.random.Generator) -> bytes:
    """Coarse shapes and some grain: about 20 kB, as a photograph of this size has."""
    coarse = Image.fromarray(numbers.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = numbers.normal(0, 6, pixels.shape).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def recipe_options(folder: Path, name: str) -> list[str]:
    """A run on the built set with tiny untrained models of the miniature's kind."""
    models = folder / "models"
    return [
        f"output={folder / name}",
        f"miniature.folder={models}",
        "miniature.data.train_scenes=600",
        *(f"miniature.foundations.{part}_steps=0" for part in ("vision", "language")),
        *(f"miniature.foundations.{part}_layers=4" for part in ("vision", "language")),
        *(f"miniature.foundations.{part}_hidden_size=32" for part in ("vision", "language")),
        f"model.vision={models}/foundations/siglip",
        f"model.language={models}/foundations/llama",
        f"data.train={next(folder.glob('built-*'))}",
        "data.validation=null",
        "data.holdout=0.001",
        f"data.num_workers={WORKERS}",
    ]


@contextmanager
def a_job(folder: Path) -> Iterator[Any]:
    """What a run does before its first step."""
    import transformers

    from hive_vision.training.callbacks import InterruptCallback
    from hive_vision.training.foundations import ensure_miniature
    from hive_vision.training.pretrain import Job
    from hive_vision.training.recipes import load_recipe
    from hive_vision.training.run_folder import RunFolder
    from hive_vision.training.watchdog import Watchdog

    transformers.utils.logging.set_verbosity_error()
    recipe = load_recipe("miniature", recipe_options(folder, "loaded"))
    assert recipe.miniature is not None
    ensure_miniature(recipe.miniature)
    run = RunFolder(recipe)
    run.create()
    with Watchdog(run.path, 0, 1, 0) as watchdog:
        yield Job(recipe, run, watchdog, InterruptCallback(60.0))


def start(folder: Path) -> tuple[float, float, float]:
    """Seconds of a fresh process for imports, for models and data, and to the first batch."""
    began = psutil.Process().create_time()
    import hive_vision.training.pretrain  # noqa: F401

    imported = time.time()
    with a_job(folder) as job:
        loaded = time.time()
        next(iter(loader_of(job.train_data, job.train_data, job.collator(job.model), 1)))
        return imported - began, loaded - imported, time.time() - loaded


def loader(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Images a second of our loader and of a bare one, in pairs that take turns."""
    with a_job(folder) as job:
        ours, collate = job.train_data, job.collator(job.model)
    bare = BareImages(next(folder.glob("built-*")))

    def processed(images: Sequence[Image.Image]) -> Any:
        return collate.image_processor(list(images), return_tensors="pt")

    results = {"one process, of its own CPU time": side_by_side(ours, bare)}
    for title, for_ours, for_bare in (
        ("read and decoded", len, len),
        ("made into batches", collate, processed),
    ):
        pairs = results[title] = []
        for seed in range(PAIRS):
            speeds = {}
            contestants = [(ours, for_ours), (bare, for_bare)]
            for data, function in contestants[:: 1 if seed % 2 else -1]:
                speeds[data is bare] = speed(loader_of(data, ours, function, PAIR_STEPS, seed))
            pairs.append((speeds[False], speeds[True]))
    return results


def side_by_side(ours: Any, bare: Any) -> list[tuple[float, float]]:
    """Images a second of CPU time, block by block in turns: nothing else on the machine counts."""
    from hive_vision.data.sampler import LengthBucketedSampler

    pairs = []
    for seed in range(PAIRS):
        order = LengthBucketedSampler(ours.lengths, BATCH, PAIR_STEPS, seed, ours.parts)
        seconds = {True: 0.0, False: 0.0}
        for number, rows in enumerate(order.batches()):
            for data in (ours, bare) if number % 2 else (bare, ours):
                began = time.process_time()
                for row in rows:
                    data[row]
                seconds[data is bare] += time.process_time() - began
        images = BATCH * PAIR_STEPS
        pairs.append((images / seconds[False], images / seconds[True]))
    return pairs


class BareImages:
    """Nothing but reading bytes at a known place and decoding them."""

    def __init__(self, built: Path) -> None:
        import datasets

        index = datasets.Dataset.from_file(str(built / "index.arrow")).data
        columns = (index.column(name).to_numpy() for name in ("shard", "offset", "size"))
        self._shard, self._offset, self._size = columns
        self._files = [os.open(path, os.O_RDONLY) for path in sorted(built.glob("*.tar"))]

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, row: int) -> Image.Image:
        file = self._files[self._shard[row]]
        content = os.pread(file, int(self._size[row]), int(self._offset[row]))
        return Image.open(io.BytesIO(content)).convert("RGB")


def loader_of(
    data: Any, order_of: Any, collate: Callable[[Any], Any], steps: int, seed: int = 0
) -> Any:
    """A loader as Trainer sets it up, in a run's order."""
    from torch.utils.data import DataLoader

    from hive_vision.data.sampler import LengthBucketedSampler

    order = LengthBucketedSampler(order_of.lengths, BATCH, steps, seed, order_of.parts)
    return DataLoader(data, BATCH, sampler=order, num_workers=WORKERS, collate_fn=collate)


def speed(batches: Any) -> float:
    """Images a second, without the start of the workers."""
    batches = iter(batches)
    for _ in range(10):
        next(batches)
    began = time.perf_counter()
    count = sum(1 for _ in batches)
    return BATCH * count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
