"""Findings with planted differences, as if two models had been looked into."""

from typing import Any

import numpy as np
from PIL import Image

from hive_vision.analysis.attention import Pointing
from hive_vision.analysis.findings import (
    ALL_STAGES,
    AttentionNumbers,
    CaptionedImage,
    MapFindings,
    Shown,
)
from hive_vision.analysis.gradient_flow import GradientFlow
from hive_vision.analysis.maps import AttentionMaps, GradientMaps

LAYERS, ATTENDING, HEADS, SAMPLES = 6, 2, 3, 40
TOKENS = ("<s>", "a", "dog", "on", "the", "sofa", "</s>")


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def gradient_maps(seed: int = 0, layers: int = LAYERS) -> GradientMaps:
    norms = np.abs(noise(seed, layers, 4, 5)) * np.arange(1, layers + 1)[:, None, None]
    return GradientMaps(2.5, norms, np.zeros(layers))


def attention_maps(seed: int = 0) -> AttentionMaps:
    weights = np.abs(noise(seed, ATTENDING, HEADS, len(TOKENS), 4, 5))
    weights *= 0.8 / weights.sum(axis=(-2, -1), keepdims=True)
    rest = np.full(weights.shape[:3], 0.1)
    return AttentionMaps(weights, rest, rest, (2, 4), (3, 6))


def flow(early: float, later_entropy: float = 0.0, seed: int = 0) -> GradientFlow:
    """The first third of the layers gets ``early`` times the gradient of the last layer."""
    profile = np.array([early, early, 1, 1, 1, 1])
    norms = profile * np.exp(0.05 * noise(seed, SAMPLES, LAYERS))
    norms[:, -1] = 1
    entropy = 0.5 + 0.01 * noise(seed + 1, SAMPLES, LAYERS)
    entropy[:, -2:] += later_entropy
    return GradientFlow(norms, entropy, np.exp(entropy), 0.1 * noise(seed + 2, 5, LAYERS))


def numbers(last_distance: float, mass: float, seed: int = 0) -> AttentionNumbers:
    distance = 0.3 + 0.01 * noise(seed, SAMPLES, ATTENDING)
    distance[:, -1] += last_distance
    masses = mass + 0.02 * noise(seed + 1, SAMPLES, ATTENDING)
    masses[:, -1] += 0.1
    others = np.full(ATTENDING, 0.2)
    looks = [Pointing(m, others, np.array([0.0, 1.0]), 0.2, 0.25) for m in masses]
    looks[0] = Pointing(masses[0], others * np.nan, np.array([0.0, 1.0]), 0.2, 0.25)
    return AttentionNumbers(distance + 0.5, distance, distance, looks, (2, 4))


def findings(**changed: Any) -> MapFindings:
    """Of ``hive``, which has 8 times the early gradient of ``sa``, and of ``sa``."""
    names = ("hive", "sa")
    picture = CaptionedImage("000.png", Image.new("RGB", (20, 16), "teal"), "a dog on the sofa")
    shown = Shown(
        picture,
        picture.image,
        dict.fromkeys(names, TOKENS),
        {name: gradient_maps(seed) for seed, name in enumerate(names)},
        {name: attention_maps(seed) for seed, name in enumerate(names)},
    )
    parts: dict[str, Any] = {
        "models": {name: f"runs/{name}" for name in names},
        "shown": [shown],
        "flows": {"hive": flow(2.0, 0.1), "sa": flow(0.25, seed=5)},
        "numbers": {"hive": numbers(0.1, 0.4), "sa": numbers(0.0, 0.15, seed=5)},
        "updates": {
            "hive": {
                "stage2": np.zeros(LAYERS),
                "stage3": np.linspace(0, 0.5, LAYERS),
                ALL_STAGES: np.linspace(0, 0.4, LAYERS),
            }
        },
        "cka": {("base", "hive"): np.eye(LAYERS), ("hive", "sa"): np.eye(LAYERS, 4)},
        "images": SAMPLES,
        "data": "planted",
    }
    return MapFindings(**{**parts, **changed})
