"""How fast a recipe's data arrives, against how fast its training steps want it."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from hive_vision.data.parallel import processors
from hive_vision.settings import read_settings
from hive_vision.studies.feed import Feed, open_feed
from hive_vision.studies.plan import make_plan
from hive_vision.training.arguments import FinetuneArguments, PretrainArguments
from hive_vision.training.feature_cache import reads_features
from hive_vision.training.run_folder import RunFolder, recipe_differences

logger = logging.getLogger(__name__)

SECONDS = 5  # for each number of workers, once all of them are at work
SPARE = 1.1  # workers must be so much faster than the step, for which they never wait then
ALONE = 10.0  # without workers every step waits for its images: at most a tenth of the time


def bench_data(
    arguments: PretrainArguments | FinetuneArguments,
    stage: str | None = None,
    seconds: float = SECONDS,
    device: str | None = None,
) -> dict[str, Any]:
    """Read a stage's batches as its trainer does, with more and more workers.

    Each number of workers goes on in the order of training where the last one stopped, so that no
    image is read a second time, from memory, before an epoch is over.

    Args:
        arguments: The recipe.
        stage: Of which stage; the first with steps to do if not given.
        seconds: How long to read with each number of workers.
        device: Name of the device that trains, where no run has been measured; this one's if not
            given.

    Returns:
        Numbers and names only. ``rates`` are samples a second by number of workers; ``shares``
        those of the time without workers; ``stages`` what each stage that reads this data takes
        (``per_second``, unknown: ``None``), how many workers are enough (``workers``, beyond what
        was tried: ``is_estimate``), and whether those of the recipe are (``is_enough``).

    Raises:
        ValueError: If data, models, recipe or device do not fit together.
    """
    feed = open_feed(arguments, stage)
    steps = _steps(arguments, feed, device)
    rows = feed.micro_batches()
    rate, shares, sides = read_alone(feed, rows, seconds)
    rates = {0: rate}
    given, most = feed.data.num_workers, processors()
    powers = {2**power for power in range(most.bit_length())}
    for workers in sorted((powers | {most, given}) - {0}):
        rates[workers] = _rate(feed, rows, workers, seconds)
        logger.info("workers=%d: %.0f %s a second", workers, rates[workers], feed.data.unit)
    stages = []
    for step in steps:
        workers, is_estimate = workers_needed(rates, step["per_second"])
        is_enough = workers is not None and _keeps_up(given, rates[given], step["per_second"])
        stages.append(
            {**step, "workers": workers, "is_estimate": is_estimate, "is_enough": is_enough}
        )
    part = f"{feed.stage}." if isinstance(arguments, FinetuneArguments) else ""
    return {
        "unit": feed.data.unit,
        "micro_batch_size": feed.micro_batch_size,
        "key": f"data.{part}num_workers",
        "num_workers": given,
        "processors": most,
        "rates": rates,
        "shares": shares,
        "image_side": round(median(sides)) if sides else None,
        "resized_to": feed.collator.image_processor.resized_to,
        "stages": stages,
    }


def workers_needed(rates: Mapping[int, float], per_second: float | None) -> tuple[int | None, bool]:
    """Say how many workers keep up with a step.

    Args:
        rates: Samples a second by number of workers, at least for 0 and 1.
        per_second: What the step takes; unknown: ``None``.

    Returns:
        The fewest of those tried, or an estimate from what one worker gives at best, and whether it
        is one; ``None`` for what is unknown.
    """
    if per_second is None:
        return None, False
    for workers in sorted(rates):
        if _keeps_up(workers, rates[workers], per_second):
            return workers, False
    each = max(rate / workers for workers, rate in rates.items() if workers)
    return max(max(rates) + 1, math.ceil(per_second * SPARE / each)), True


def _keeps_up(workers: int, rate: float, per_second: float) -> bool:
    return rate >= per_second * (SPARE if workers else ALONE)


def _steps(
    arguments: PretrainArguments | FinetuneArguments, feed: Feed, device: str | None
) -> list[dict[str, Any]]:
    """What the stages that read this data take, as measured in a run or planned."""
    own = [feed.stage] if isinstance(arguments, FinetuneArguments) else list(arguments.stages)
    own = [name for name in own if arguments.stages[name].steps(feed.data.samples)]
    measured = _measured(arguments, own)
    if measured is not None:
        return [
            {"name": name, "per_second": rate, "source": arguments.output}
            for name, rate in measured.items()
        ]
    if isinstance(arguments, FinetuneArguments):
        return [{"name": name, "per_second": None, "source": None} for name in own]
    plan = make_plan(arguments, device)
    return [
        {
            "name": stage["name"],
            "per_second": stage["steps"] * stage["batch_size"] / (stage["hours"] * 3600),
            "source": f"plan for {plan['device']['name']}",
        }
        for stage in plan["stages"]
    ]


def _measured(
    arguments: PretrainArguments | FinetuneArguments, stages: list[str]
) -> dict[str, float] | None:
    """Samples a second of the stages that read images, if the output is a run of this recipe.

    ``None`` if it is not, or if a stage's speed is not known.
    """
    run = RunFolder(arguments)
    if not (run.path / "recipe.yaml").is_file():
        return None
    saved = read_settings(type(arguments), path=run.path / "recipe.yaml")
    changed = recipe_differences(RunFolder(saved).recipe, run.recipe)
    if not all(change.startswith("data.") for change in changed):
        return None
    rates = {}
    for name in stages:
        result = run.stage_result(name)
        if result is None or not result["seconds_per_step"]:  # stopped behind its last step
            return None
        if not reads_features(run.stage(name)):
            rates[name] = arguments.stages[name].batch_size / result["seconds_per_step"]
    return rates


class _Stopwatch:
    """A function that keeps count of the time it takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return result


def read_alone(
    feed: Feed, rows: Iterator[list[int]], seconds: float
) -> tuple[float, dict[str, float], list[int]]:
    """Read batches without workers.

    Args:
        feed: What is read.
        rows: Of each batch.
        seconds: For how long.

    Returns:
        Samples a second, shares of the time, shorter sides of the images.
    """
    prepare = _Stopwatch(feed.collator.image_processor)
    collate = _Stopwatch(dataclasses.replace(feed.collator, image_processor=prepare))
    read = _Stopwatch(lambda batch: [feed.data.train[row] for row in batch])
    sides, samples = [], 0
    collate(read(next(rows)))  # warm-up
    prepare.seconds = collate.seconds = read.seconds = 0.0
    while samples == 0 or read.seconds + collate.seconds < seconds:
        batch = read(next(rows))
        collate(batch)
        samples += len(batch)
        for sample in batch:
            sides += [min(i.size) for i in sample.get("images", [sample.get("image")])]
    total = read.seconds + collate.seconds
    shares = {
        "reading and decoding": read.seconds / total,
        "resizing": prepare.seconds / total,
        "collating": (collate.seconds - prepare.seconds) / total,
    }
    return samples / total, shares, sides


def _rate(feed: Feed, rows: Iterator[list[int]], workers: int, seconds: float) -> float:
    """Samples a second that some workers give, their start left out."""
    batches = iter(feed.loader(rows, workers))
    for _ in range(2 * workers):
        next(batches)
    samples, started = 0, time.perf_counter()
    while True:
        # In rounds: workers that began together are ready together.
        for _ in range(workers):
            samples += len(next(batches)["labels"])
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return samples / elapsed
