"""Real training steps of a recipe's model with random weights: their time and memory.

Each case runs in a process of its own, so that its memory is its own and no case warms up another.

Shapes: B captions of a micro-batch, T text tokens.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, logging

from hive_vision.analysis.devices import measured_speed
from hive_vision.data.collators import IGNORE_INDEX
from hive_vision.studies.recipe_model import recipe_model
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.hardware import precision_on, prepare_model, this_device
from hive_vision.training.stages import apply_rules, parameter_groups


@dataclass(frozen=True)
class StepCase:
    """What to measure.

    Attributes:
        arguments: The recipe, its method included.
        stage: One of its stages.
        batch: B.
        tokens: T of the longest caption; one other is a token shorter, as in nearly every batch.
        side: Of the images in pixels; the encoder's own if not given.
        steps: So many are timed at least,
        seconds: and for so long.
        counts: Also count operations with torch's counter, in a step apart.
    """

    arguments: PretrainArguments
    stage: str
    batch: int
    tokens: int
    side: int | None = None
    steps: int = 1
    seconds: float = 1.0
    counts: bool = False


@dataclass(frozen=True)
class MeasuredSteps:
    """What was measured of a case.

    Attributes:
        seconds: Of a step, the median.
        forward: Seconds of it until the loss is known.
        backward: Seconds of it until the gradients are.
        optimizer: The rest: clipping, AdamW.
        steps: How many steps were timed.
        memory: Bytes at the fullest moment, beyond what the process had before the model.
        speed: Operations per second of matrix products in the same precision, a moment before.
        flops: Of a micro-batch as torch's counter counts them; ``None`` if they were not counted.
    """

    seconds: float
    forward: float
    backward: float
    optimizer: float
    steps: int
    memory: int
    speed: float
    flops: float | None


def measure_apart(
    case: StepCase, measure: Callable[[StepCase], MeasuredSteps] | None = None
) -> MeasuredSteps:
    """Measure a case in a process of its own.

    Args:
        case: What to measure.
        measure: How; ``measure_steps`` if not given.

    Raises:
        RuntimeError: If memory was short, or the process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure or measure_steps, case).result()
        except RuntimeError as error:
            short = isinstance(error, BrokenProcessPool | torch.OutOfMemoryError)
            if not short and "can't allocate memory" not in str(error):
                raise
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"{case.stage} of {case.arguments.method} with {case.batch} captions of "
                f"{case.tokens} tokens did not end ({reason}); give fewer at once: "
                "micro_batch_size of plan, batch of profile"
            ) from error


def measure_steps(case: StepCase) -> MeasuredSteps:
    """Measure a case in this process, which is changed by it (see ``measure_apart``)."""
    logging.set_verbosity_error()
    device, arguments = this_device(), case.arguments
    before = used_memory(device)
    torch.manual_seed(0)
    model, images, image_tokens = recipe_model(arguments, device, case.side)
    stage = arguments.stages[case.stage]
    groups = parameter_groups(model)
    apply_rules(model, stage.rules, groups)
    prepare_model(model.train(), arguments, groups)
    batch = _batch(model, images, image_tokens, case)
    precision = precision_on(device, arguments.precision)

    def loss() -> Tensor:
        result: Tensor = model(**batch, return_logits=False).loss
        return result

    return time_steps(model, loss, precision, case, before)


def time_steps(
    model: PreTrainedModel,
    loss: Callable[[], Tensor],
    precision: torch.dtype,
    case: StepCase,
    before: int,
) -> MeasuredSteps:
    """Time a loop around a model: autocast, backward, clipping and AdamW, as the trainer has them.

    Args:
        model: Frozen or not as its stage says.
        loss: Runs it on a batch.
        precision: Of the products.
        case: How many steps.
        before: ``used_memory`` before there was a model.
    """
    device = next(model.parameters()).device.type
    speed = measured_speed(device, precision)
    stage = case.arguments.stages[case.stage]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=stage.betas, fused=True)

    def forward() -> Tensor:
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            return loss()

    def step() -> tuple[float, float, float]:
        times = [now()]
        result = forward()
        times.append(now())
        torch.autograd.backward(result)
        times.append(now())
        torch.nn.utils.clip_grad_norm_(trained, stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(now())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]

    # The first allocates AdamW's states, the second the rest around them; kernels are chosen.
    for _ in range(2):
        step()
    taken: list[tuple[float, float, float]] = []
    with _fullest_moment(device) as memory:
        while len(taken) < case.steps or sum(map(sum, taken)) < case.seconds:
            taken.append(step())
    flops = None
    if case.counts:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(forward())
        flops = float(counter.get_total_flops())
    forward_time, backward, rest = (median(times) for times in zip(*taken, strict=True))
    seconds, peak = median(map(sum, taken)), max(memory) - before
    return MeasuredSteps(seconds, forward_time, backward, rest, len(taken), peak, speed, flops)


def _batch(
    model: PreTrainedModel, images: dict[str, Tensor], image_tokens: int, case: StepCase
) -> dict[str, Tensor]:
    """Captions of random tokens, all supervised but the start and the images' placeholders."""
    device, width = images["pixel_values"].device, image_tokens + case.tokens
    input_ids = torch.randint(3, model.config.text_config.vocab_size - 1, (case.batch, width))
    if image_tokens:
        input_ids[:, 1 : 1 + image_tokens] = model.config.image_token_index
    labels = input_ids.clone()
    labels[:, : 1 + image_tokens] = IGNORE_INDEX
    mask = torch.ones_like(input_ids)
    if case.batch > 1:
        mask[-1, -1], labels[-1, -1] = 0, IGNORE_INDEX
    text = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    repeated = {
        name: image.expand(case.batch, *image.shape[1:]).contiguous()
        for name, image in images.items()
    }
    repeated["pixel_values"] = torch.randn_like(repeated["pixel_values"])
    return {**repeated, **{name: value.to(device) for name, value in text.items()}}


def used_memory(device: str) -> int:
    """Bytes that this process uses; of a GPU 0, whose tensors alone are counted."""
    return 0 if device == "cuda" else int(psutil.Process().memory_info().rss)


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _fullest_moment(device: str) -> Iterator[list[int]]:
    """Collect bytes in use; the largest number is the peak."""
    seen: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield seen
        seen.append(torch.cuda.max_memory_allocated())
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            seen.append(used_memory(device))

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield seen
    finally:
        done.set()
        looker.join()
        seen.append(used_memory(device))
