"""One encoder on one classification set: from images to a result with its settings."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hive_vision.data.classification import ClassificationSet
from hive_vision.data.parallel import processors
from hive_vision.data.sources import hash_parts
from hive_vision.evaluation.arguments import WHOLE_MODEL, ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder, Reading, read_features
from hive_vision.evaluation.paper_protocol import probe_paper
from hive_vision.evaluation.probing import (
    LabelledFeatures,
    Outcome,
    probe_fast,
    probe_neighbours,
)
from hive_vision.evaluation.statistics import Accuracy, accuracy
from hive_vision.folders import acquire
from hive_vision.models.probes import AttentiveProbe, LinearProbe

DEFAULT_CACHE = "~/.cache/hive-vision/features"
MOST_WORKERS = 8


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a probe found, and everything that it was found with.

    Attributes:
        encoder: Folder, hub id or name.
        data: Name of the classification set.
        correct: (S, M) which test images each seed's head classified correctly.
        seeds: S of them; empty where nothing is random.
        settings: All numbers and choices that the result depends on.
        chosen: For each seed what was chosen on held-out training images.
    """

    encoder: str
    data: str
    correct: NDArray[np.bool_]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    chosen: tuple[dict[str, float], ...] = field(default=())

    @property
    def accuracy(self) -> Accuracy:
        """Mean and spread."""
        return accuracy(self.correct)

    def to_json(self) -> dict[str, Any]:
        """Give everything; of each seed, which images were correct as one hexadecimal number."""
        return {
            "encoder": self.encoder,
            "data": self.data,
            **asdict(self.accuracy),
            "by_seed": {
                str(seed): float(share)
                for seed, share in zip(self.seeds, self.correct.mean(axis=1), strict=False)
            },
            "chosen": list(self.chosen),
            "settings": self.settings,
            "correct": [np.packbits(row).tobytes().hex() for row in self.correct],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` gave."""
        rows = [np.frombuffer(bytes.fromhex(row), np.uint8) for row in content["correct"]]
        correct = np.stack([np.unpackbits(row, count=content["images"]) for row in rows])
        return cls(
            content["encoder"],
            content["data"],
            correct.astype(bool),
            tuple(int(seed) for seed in content["by_seed"]),
            content["settings"],
            tuple(content["chosen"]),
        )


def probe_encoder(
    encoder: FrozenEncoder, data: ClassificationSet, arguments: ProbeArguments
) -> ProbeResult:
    """Judge a frozen encoder by a classification set.

    Args:
        encoder: The encoder.
        data: The set.
        arguments: Which probe, which protocol, and their numbers.

    Raises:
        ValueError: If encoder, set and arguments do not fit together.
    """
    if arguments.probe in WHOLE_MODEL:
        raise ValueError(
            f"probe is {arguments.probe}, which judges a whole CLIP or SigLIP; an encoder is "
            "judged by probe=linear, attentive or knn"
        )
    reading = _reading(encoder, arguments)
    encoder.check(reading)
    facts: dict[str, Any] = {
        "probe": arguments.probe,
        "layer": reading.layer,
        "depth": encoder.depth,
        "pooling": "tokens" if arguments.probe == "attentive" else arguments.pooling,
        "keep_prefix": arguments.keep_prefix,
        "precision": encoder.precision,
        "data": data.settings,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": data.classes,
    }
    if arguments.probe == "knn":
        facts["neighbours"] = arguments.neighbours
        train, test = _features(encoder, data, reading, arguments)
        outcome = probe_neighbours(train, test, arguments.neighbours)
    elif arguments.protocol == "fast":
        facts |= {"protocol": "fast", **asdict(arguments.fast)}
        train, test = _features(encoder, data, reading, arguments)
        heads = attention_heads(encoder) if arguments.probe == "attentive" else None
        outcome = probe_fast(train, test, data.classes, arguments.fast, arguments.seeds, heads)
    else:
        facts |= {"protocol": "paper", **asdict(arguments.paper)}
        outcome = _paper(encoder, data, reading, arguments)
    return ProbeResult(
        encoder.name, data.name, outcome.correct, outcome.seeds, facts, outcome.chosen
    )


def attention_heads(encoder: FrozenEncoder) -> int:
    """Heads of an attentive probe: the encoder's, or 64 channels each where it does not say."""
    heads: int | None = getattr(encoder.model.config, "num_attention_heads", None)
    return heads or max(1, encoder.width // 64)


def feature_cache(arguments: ProbeArguments) -> Path:
    """Where features are kept."""
    return Path(arguments.cache or DEFAULT_CACHE).expanduser()


def worker_count(arguments: ProbeArguments) -> int:
    """How many processes decode images: as many as were asked for, or what keeps a GPU busy."""
    if arguments.num_workers is not None:
        return max(1, arguments.num_workers)
    return min(MOST_WORKERS, processors()) if torch.cuda.is_available() else 1


def _reading(encoder: FrozenEncoder, arguments: ProbeArguments) -> Reading:
    """What is read of an encoder; the paper's protocol pools behind a norm that it trains."""
    layer = encoder.layer(arguments.layer)
    whole = arguments.probe == "attentive"
    if arguments.protocol == "paper" and arguments.probe == "linear":
        whole = arguments.pooling != "head"
        if arguments.pooling == "cls":
            encoder.check(Reading(layer, "cls"))
            return Reading(layer, "tokens", keep_prefix=True)
    return Reading(layer, "tokens" if whole else arguments.pooling, arguments.keep_prefix)


def _features(
    encoder: FrozenEncoder, data: ClassificationSet, reading: Reading, arguments: ProbeArguments
) -> tuple[LabelledFeatures, LabelledFeatures]:
    train, test = (
        LabelledFeatures(
            read_features(
                encoder,
                images,
                [reading],
                feature_cache(arguments),
                arguments.batch_size,
                worker_count(arguments),
            )[0],
            images.labels,
        )
        for images in (data.train, data.test)
    )
    return train, test


def _paper(
    encoder: FrozenEncoder, data: ClassificationSet, reading: Reading, arguments: ProbeArguments
) -> Outcome:
    make: Callable[[], nn.Module] = partial(
        LinearProbe, encoder.width, data.classes, arguments.pooling
    )
    if arguments.probe == "attentive":
        make = partial(AttentiveProbe, encoder.width, data.classes, attention_heads(encoder))
    settings = asdict(arguments.paper)
    key = hash_parts(
        encoder.digest.encode(),
        data.train.fingerprint.encode(),
        data.test.fingerprint.encode(),
        repr((reading, arguments.probe, arguments.pooling, settings)).encode(),
    )
    cache, workers = feature_cache(arguments) / "paper", worker_count(arguments)
    cache.mkdir(parents=True, exist_ok=True)
    with acquire(
        cache / f".{key[:16]}.lock",
        f"another process trains the same heads on {encoder.name!r} and {data.name!r} right now; "
        "wait for it",
    ):
        return probe_paper(
            encoder,
            reading,
            data,
            make,
            arguments.paper,
            arguments.seeds,
            cache / key[:32],
            workers,
        )
