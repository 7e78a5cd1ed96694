"""Encoders side by side: accuracies with their spread, layer by layer, and between two encoders."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from hive_vision.data.classification import (
    ClassificationSet,
    ClassificationSource,
    load_classification_set,
)
from hive_vision.data.sources import Source, choose_split, open_source
from hive_vision.evaluation.arguments import WHOLE_MODEL, ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder, Reading, read_features
from hive_vision.evaluation.probe import (
    ProbeResult,
    feature_cache,
    probe_encoder,
    worker_count,
)
from hive_vision.evaluation.zero_shot import DualEncoder, classify_zero_shot, retrieve
from hive_vision.models.backbones import load_vision_model
from hive_vision.models.merging import (
    interpolate_encoders,
    is_dual_encoder,
    replace_vision_half,
)
from hive_vision.models.processing import load_image_processor

logger = logging.getLogger(__name__)

# Method -> classification set -> result.
Results: TypeAlias = dict[str, dict[str, ProbeResult]]


def load_sets(names: Iterable[str], arguments: ProbeArguments) -> list[ClassificationSet]:
    """Load classification sets with the columns and splits of the arguments.

    Raises:
        ValueError: If one cannot be used, or two have one name.
    """
    sets = [
        load_classification_set(
            ClassificationSource(
                name,
                arguments.image_column,
                arguments.label_column,
                arguments.train_split,
                arguments.test_split,
            )
        )
        for name in names
    ]
    _check_names([data.name for data in sets])
    return sets


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two data sets are called {name!r}; probe them apart")


def compare_encoders(
    encoders: Mapping[str, str], names: Sequence[str], arguments: ProbeArguments
) -> Results:
    """Probe every encoder on every set.

    Args:
        encoders: Method -> folder or hub id.
        names: Classification sets; captioned images for retrieval.
        arguments: Which probe, and its numbers.
    """
    if arguments.probe == "retrieval":
        return _compare_retrieval(encoders, names, arguments)
    sets = load_sets(names, arguments)
    if arguments.probe == "zero_shot":
        return {
            method: {data.name: _zero_shot(encoder, data, arguments) for data in sets}
            for method, encoder in _dual_encoders(encoders, arguments)
        }
    results: Results = {}
    for method, source in encoders.items():
        encoder = FrozenEncoder.load(source, precision=arguments.precision)
        results[method] = {}
        for data in sets:
            logger.info("probing %s on %s", method, data.name)
            results[method][data.name] = probe_encoder(encoder, data, arguments)
    return results


def probe_layers(
    encoders: Mapping[str, str], data: ClassificationSet, arguments: ProbeArguments
) -> dict[str, list[ProbeResult]]:
    """Probe what leaves every layer; all layers are read in one pass.

    Args:
        encoders: Method -> folder or hub id.
        data: A classification set.
        arguments: Which probe, and its numbers; its layer does not count.

    Returns:
        For each method a result for each of its layers, from the first on.

    Raises:
        ValueError: If the pooling is that of the encoder's own head, which has one layer, or the
            probe is of a whole model.
    """
    check_layers(arguments)
    results = {}
    for method, source in encoders.items():
        encoder = FrozenEncoder.load(source, precision=arguments.precision)
        layers = range(1, encoder.depth + 1)
        if arguments.probe != "attentive":  # whose tokens of all layers at once are many
            readings = [
                Reading(layer, arguments.pooling, arguments.keep_prefix) for layer in layers
            ]
            for images in (data.train, data.test):
                read_features(
                    encoder,
                    images,
                    readings,
                    feature_cache(arguments),
                    arguments.batch_size,
                    worker_count(arguments),
                )
        logger.info("probing %d layers of %s on %s", len(layers), method, data.name)
        results[method] = [
            probe_encoder(encoder, data, replace(arguments, layer=layer)) for layer in layers
        ]
    return results


def check_layers(arguments: ProbeArguments) -> None:
    """Refuse a probe that no inner layer can have.

    Raises:
        ValueError: Says what it can.
    """
    if (
        arguments.pooling == "head"
        or arguments.protocol == "paper"
        or arguments.probe in WHOLE_MODEL
    ):
        raise ValueError(
            "layers are probed with probe=linear, attentive or knn, protocol=fast and pooling=mean "
            f"or cls; got probe={arguments.probe}, protocol={arguments.protocol} and "
            f"pooling={arguments.pooling}"
        )


def probe_between(
    base: str,
    trained: str,
    alphas: Sequence[float],
    names: Sequence[str],
    arguments: ProbeArguments,
) -> dict[str, dict[str, list[ProbeResult]]]:
    """Probe encoders with weights between a base and a trained one.

    Args:
        base: The whole CLIP or SigLIP, or the plain encoder, that training started from.
        trained: The encoder that came out.
        alphas: Shares of the trained weights, 0 to 1.
        names: Classification sets.
        arguments: Which probe, and its numbers.

    Returns:
        Set -> kind of probe, and ``zero_shot`` if the base is a whole model and the set has class
        names -> a result for each alpha.

    Raises:
        ValueError: If base and trained encoder do not fit, or the probe is of a whole model.
    """
    if arguments.probe in WHOLE_MODEL:
        raise ValueError(
            f"probe is {arguments.probe}, but between encoders zero_shot is shown by itself beside "
            "probe=linear, attentive or knn: choose one of these"
        )
    sets = load_sets(names, arguments)
    start, end = load_vision_model(base), load_vision_model(trained)
    image_processor = load_image_processor(trained)
    whole = None
    if is_dual_encoder(base):
        whole = DualEncoder.load(base, precision=arguments.precision)
    nameless = [data.name for data in sets if not data.class_names]
    if whole is not None and nameless:
        logger.warning("no zero-shot accuracy on %s: no class names", ", ".join(nameless))
    found: dict[str, dict[str, list[ProbeResult]]] = {data.name: {} for data in sets}
    for alpha in alphas:
        mixed = interpolate_encoders(start, end, alpha)
        if whole is not None:
            replace_vision_half(whole.model, mixed.to(whole.device), base)
        encoder = FrozenEncoder(f"alpha {alpha:g}", mixed, image_processor, arguments.precision)
        for data in sets:
            logger.info("probing alpha %g on %s", alpha, data.name)
            result = probe_encoder(encoder, data, arguments)
            found[data.name].setdefault(arguments.probe, []).append(result)
            if whole is not None and data.class_names:
                result = _zero_shot(whole, data, arguments)
                found[data.name].setdefault("zero_shot", []).append(result)
    return found


def _dual_encoders(
    encoders: Mapping[str, str], arguments: ProbeArguments
) -> Iterator[tuple[str, DualEncoder]]:
    for method, source in encoders.items():
        logger.info("probing %s", method)
        yield method, DualEncoder.load(source, precision=arguments.precision)


def _zero_shot(
    encoder: DualEncoder, data: ClassificationSet, arguments: ProbeArguments
) -> ProbeResult:
    correct = classify_zero_shot(
        encoder,
        data.test,
        data.class_names,
        arguments.templates,
        arguments.batch_size,
        worker_count(arguments),
    )
    settings = {
        "probe": "zero_shot",
        "templates": list(arguments.templates),
        "precision": arguments.precision,
        "data": data.settings,
        "test_images": len(data.test),
        "classes": data.classes,
    }
    return ProbeResult(encoder.name, data.name, correct, (), settings)


def _compare_retrieval(
    encoders: Mapping[str, str], names: Sequence[str], arguments: ProbeArguments
) -> Results:
    """Recall at 1, 5 and 10 in both directions; a row for each."""
    _check_names([Path(name).name for name in names])
    sources = {}
    for name in names:
        source = Source(
            name,
            split=arguments.test_split,
            image_column=arguments.image_column or "image",
            caption_column=arguments.caption_column,
        )
        sources[Path(name).name] = choose_split(open_source(source), "test", name)
    results: Results = {}
    for method, encoder in _dual_encoders(encoders, arguments):
        results[method] = {}
        for name, source in sources.items():
            found = retrieve(encoder, source, arguments.batch_size, worker_count(arguments))
            settings = {"probe": "retrieval", "precision": arguments.precision, "data": source.name}
            for direction, hits in (
                ("image to text", found.image_to_text),
                ("text to image", found.text_to_image),
            ):
                for k, correct in hits.items():
                    row = f"{name} {direction} R@{k}"
                    results[method][row] = ProbeResult(encoder.name, row, correct, (), settings)
    return results
