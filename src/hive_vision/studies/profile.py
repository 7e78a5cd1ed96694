"""What a recipe costs: operations counted, time and memory measured, method beside method.

Shapes: B captions of a micro-batch, T text tokens, N image tokens.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from transformers import TimmWrapperConfig

from hive_vision.analysis.complexity import Complexity
from hive_vision.analysis.components import COMPONENTS, VISION, Place
from hive_vision.analysis.cost_model import StageCost, stage_cost
from hive_vision.analysis.tracing import Trace
from hive_vision.models.backbones import has_any_size, image_token_counts, pair
from hive_vision.models.layer_selection import select_encoder_layers
from hive_vision.studies.data_bench import read_alone
from hive_vision.studies.feed import open_feed
from hive_vision.studies.measured_steps import MeasuredSteps, StepCase, measure_apart
from hive_vision.studies.plan import caption_lengths, data_is_here
from hive_vision.studies.recipe_model import backbone_config, recipe_model
from hive_vision.training.arguments import Method, PretrainArguments
from hive_vision.training.hardware import precision_on, this_device
from hive_vision.training.miniature import ensure_miniature
from hive_vision.training.stages import apply_rules, parameter_groups, spare_vision_tail

logger = logging.getLogger(__name__)

METHODS: tuple[Method, ...] = ("sa", "hive", "cascaded")
SCALING_SIDES = (224, 384, 512, 768, 1024)
SCALING_TOKENS = (8, 16, 32, 77, 128, 256)


@dataclass(frozen=True)
class ProfileArguments:
    """What to profile of a recipe.

    Args:
        methods: Which methods; hive is compared with sa where both are there.
        stages: Which stages; all that the recipe has if empty.
        batch: Captions of a micro-batch; the recipe's micro_batch_size if null.
        tokens: Length of every caption; that of the data, or 16 where it is not here, if null.
        repetitions: How often each case is measured, in turns; 0 counts operations only.
        scaling: Also count operations at other resolutions and text lengths, of sa and hive.
    """

    methods: tuple[Method, ...] = METHODS
    stages: tuple[str, ...] = ()
    batch: int | None = None
    tokens: int | None = None
    repetitions: int = 3
    scaling: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be profiled."""
        if not self.methods:
            raise ValueError(f"methods is empty; give at least one of {', '.join(METHODS)}")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods has {method!r}; it takes {', '.join(METHODS)}")
        for name, least in (("batch", 1), ("tokens", 2), ("repetitions", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


def profile(recipe: PretrainArguments, arguments: ProfileArguments) -> dict[str, Any]:
    """Count, and measure on this machine with random weights.

    Args:
        recipe: The recipe; its method does not matter.
        arguments: What to profile.

    Returns:
        Numbers and names only, ready for JSON: ``stages`` (for each method operations by
        component and what was measured), ``loading`` (seconds of a caption's image in one process,
        ``None`` if the data is not here), ``formulas``, ``scaling``.

    Raises:
        ValueError: If the recipe or its backbones do not fit.
        RuntimeError: If a case does not fit this machine.
    """
    stages = _stages(recipe, arguments)
    if recipe.miniature is not None:
        ensure_miniature(recipe.miniature)
    captions = caption_lengths(recipe, arguments.tokens, None)
    tokens = max(2, math.ceil(captions.tokens))
    batch = arguments.batch or recipe.micro_batch_size
    recipes = {method: replace(recipe, method=method) for method in arguments.methods}
    costs = {method: costs_of(recipes[method], stages) for method in recipes}
    cases = {
        (stage, method): StepCase(recipes[method], stage, batch, tokens)
        for stage in stages
        for method in recipes
    }
    measured = _measure(cases, arguments.repetitions)
    scales = arguments.scaling and {"sa", "hive"} & recipes.keys()
    device = this_device()
    precision = str(precision_on(device, recipe.precision)).removeprefix("torch.")
    return {
        "vision": recipe.model.vision,
        "language": recipe.model.language,
        "device": device,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "batch": batch,
        "tokens": tokens,
        "captions": asdict(captions),
        "loading": _loading(recipe) if arguments.repetitions else None,
        "stages": [
            {
                "name": stage,
                "methods": {
                    method: {
                        "flops": _by_component(_trace(costs[method][stage], recipe), tokens),
                        **_summary(
                            measured[stage, method], costs[method][stage], recipe, batch, tokens
                        ),
                    }
                    for method in recipes
                },
            }
            for stage in stages
        ],
        "formulas": _formulas(recipe, tokens),
        "scaling": list(_scaling(recipes, stages[-1], tokens)) if scales else [],
    }


def _stages(recipe: PretrainArguments, arguments: ProfileArguments) -> list[str]:
    chosen = [name for name, stage in recipe.stages.items() if stage.max_steps != 0]
    if not chosen:
        raise ValueError("max_steps is 0 in every stage, so there is nothing to profile")
    for name in arguments.stages:
        if name not in chosen:
            raise ValueError(f"stages has {name!r}; the recipe has {', '.join(chosen)}")
    return [name for name in chosen if not arguments.stages or name in arguments.stages]


def costs_of(
    recipe: PretrainArguments, stages: Sequence[str], side: int | None = None
) -> dict[str, StageCost]:
    """Trace a recipe's stages.

    Args:
        recipe: The recipe, its method included.
        stages: Which stages.
        side: Of the images in pixels; the encoder's own if not given.
    """
    model, images, image_tokens = recipe_model(recipe, side=side)
    groups, found = parameter_groups(model), {}
    spare_vision_tail(model, groups)
    precision = precision_on(this_device(), recipe.precision)
    for name in stages:
        apply_rules(model, recipe.stages[name].rules, groups)
        found[name] = stage_cost(
            model,
            images,
            image_tokens=image_tokens,
            autocast=None if precision == torch.float32 else precision,
            checkpointing=recipe.gradient_checkpointing,
        )
    return found


def _measure(
    cases: dict[tuple[str, Method], StepCase], repetitions: int
) -> dict[tuple[str, Method], list[MeasuredSteps]]:
    """All methods of a stage in turns, so that a machine's moods hit them alike."""
    found: dict[tuple[str, Method], list[MeasuredSteps]] = {key: [] for key in cases}
    for stage in dict.fromkeys(stage for stage, _ in cases):
        for repetition in range(repetitions):
            for key, case in cases.items():
                if key[0] == stage:
                    logger.info(
                        "measuring %s, %d of %d", " ".join(key), repetition + 1, repetitions
                    )
                    found[key].append(measure_apart(replace(case, counts=repetition == 0)))
    return found


def _loading(recipe: PretrainArguments) -> float | None:
    """Seconds that one process takes to read and prepare the image of a caption."""
    if not data_is_here(recipe):
        return None
    feed = open_feed(recipe)
    rate, _, _ = read_alone(feed, feed.micro_batches(), seconds=1)
    return 1 / rate


def _trace(cost: StageCost, recipe: PretrainArguments) -> Trace:
    return cost.trace(recipe.gradient_checkpointing)


def _by_component(trace: Trace, tokens: float) -> dict[str, dict[str, float]]:
    """Component -> operations of one caption, forward and backward."""
    flops = trace.flops_by_place(tokens)
    return {
        component: {
            "forward": flops.get(Place(component, False), 0.0),
            "backward": flops.get(Place(component, True), 0.0),
        }
        for component in COMPONENTS
        if Place(component, False) in flops
    }


def _summary(
    measured: Sequence[MeasuredSteps],
    cost: StageCost,
    recipe: PretrainArguments,
    batch: int,
    tokens: int,
) -> dict[str, Any]:
    trace, checkpointing = _trace(cost, recipe), recipe.gradient_checkpointing
    total = trace.flops_per_sample(tokens)
    predicted = cost.memory(batch, tokens, share=batch, checkpointing=checkpointing)
    result: dict[str, Any] = {
        "flops_per_caption": total,
        "flops_beside_vision": _beside_vision(trace, tokens),
        "predicted_memory": predicted.total,
    }
    if measured:
        (counted,) = [steps.flops for steps in measured if steps.flops is not None]
        seconds = [steps.seconds for steps in measured]
        shares = [batch * total / steps.seconds / steps.speed for steps in measured]
        result |= {
            "counted_by_torch": counted / batch,
            "seconds": seconds,
            "seconds_spread": _spread(seconds),
            "parts": {
                part: median(getattr(steps, part) for steps in measured)
                for part in ("forward", "backward", "optimizer")
            },
            "share_of_ceiling": _spread(shares),
            "ceiling": _spread([steps.speed for steps in measured]),
            "memory": max(steps.memory for steps in measured),
        }
    return result


def _formulas(recipe: PretrainArguments, tokens: int) -> dict[str, float]:
    """Equations 2 to 5 for the recipe's sizes."""
    vision = backbone_config(recipe.model.vision, "vision")
    language = backbone_config(recipe.model.language, "language")
    selection, density = recipe.model.layer_selection, recipe.model.layer_density
    grid, prefix = image_token_counts(vision)
    sizes = Complexity(
        language_layers=language.num_hidden_layers,
        selected_layers=len(select_encoder_layers(vision.num_hidden_layers, selection, density)),
        image_tokens=grid + prefix,
        text_tokens=tokens,
        width=language.hidden_size,
    )
    return {
        **asdict(sizes),
        "self_attention": sizes.self_attention,
        "hive": sizes.hive,
        "hive_with_image_tokens": sizes.hive_with_image_tokens,
    }


def _scaling(
    recipes: dict[Method, PretrainArguments], stage: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """Operations of one caption at other resolutions, and at other text lengths."""
    vision = backbone_config(next(iter(recipes.values())).model.vision, "vision")
    own = None if has_any_size(vision) else pair(vision.image_size)[0]
    sides: set[int | None] = {own}
    if own is not None and not isinstance(vision, TimmWrapperConfig):
        sides |= {max(1, side // vision.patch_size) * vision.patch_size for side in SCALING_SIDES}
    for side in sorted(sides, key=lambda side: side or 0):
        costs = {
            method: _trace(costs_of(recipe, [stage], None if side == own else side)[stage], recipe)
            for method, recipe in recipes.items()
            if method in ("sa", "hive")
        }
        if side is not None:
            vision.image_size = side
        for length in {tokens, *(SCALING_TOKENS if side == own else ())}:
            yield {
                "image_tokens": sum(image_token_counts(vision)),
                "text_tokens": length,
                "flops": {m: trace.flops_per_sample(length) for m, trace in costs.items()},
                "beside_vision": {m: _beside_vision(t, length) for m, t in costs.items()},
            }


def _beside_vision(trace: Trace, tokens: float) -> float:
    """Operations of everything but the encoder: what the paper's ratios can only be of."""
    flops = trace.flops_by_place(tokens)
    return sum(amount for place, amount in flops.items() if place.component != VISION)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return median(values), min(values), max(values)
