"""Look inside of trained models: maps of samples, and numbers over a data set.

Shapes: n samples, L encoder layers, S attending layers.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hive_vision.analysis.attention import (
    Pointing,
    Spread,
    attention_spread,
    mean_pointing,
    pointing,
)
from hive_vision.analysis.cka import FEWEST, cka_matrix, layer_means
from hive_vision.analysis.findings import (
    ALL_STAGES,
    AttentionNumbers,
    CaptionedImage,
    MapFindings,
    Shown,
)
from hive_vision.analysis.gradient_flow import gradient_flow, weight_updates
from hive_vision.analysis.inspection import STAGES, InspectedModel, Sample, find_model
from hive_vision.analysis.maps import AttentionMaps, GradientMaps, attention_maps, gradient_maps
from hive_vision.data.images import StoredImage, read_image
from hive_vision.data.miniature.truth import NamedObject, read_named_objects
from hive_vision.data.sources import CaptionSource, Source, choose_split, open_source
from hive_vision.models.backbones import load_config, load_vision_model
from hive_vision.models.processing import load_image_processor
from hive_vision.reporting.map_report import MapStyle, check_style
from hive_vision.reporting.run_facts import read_recipe
from hive_vision.studies.map_arguments import MapsArguments as MapsArguments
from hive_vision.training.recipes import load_recipe
from hive_vision.training.run_data import open_parts

logger = logging.getLogger(__name__)

BASE = "base"


def look_inside(models: Mapping[str, str], arguments: MapsArguments) -> MapFindings:
    """Draw and measure one model after another.

    What cannot be done is said before anything is measured, which takes minutes.

    Args:
        models: Name -> run folder or model folder; runs of method base have an encoder only.
        arguments: What to look at.

    Raises:
        ValueError: If a model or the data cannot be read, or there is nothing to look at.
    """
    readers = {name: folder for name, folder in models.items() if not _is_base(folder)}
    if not readers:
        raise ValueError("maps: no model reads captions; give a run of hive, cascaded or sa")
    for folder in readers.values():
        _check_base(folder, find_model(folder, arguments.stage))
    pictures, data = _pictures(next(iter(readers.values())), arguments)
    drawn = pictures[: arguments.samples] if arguments.image is None else pictures
    measured = pictures[: arguments.flow_samples] if arguments.image is None else []
    objects = {}
    if arguments.masks is not None:
        names = [picture.name for picture in measured]
        objects = read_named_objects(Path(data), Path(arguments.masks), names)
    gradients: list[dict[str, GradientMaps]] = [{} for _ in drawn]
    attention: list[dict[str, AttentionMaps]] = [{} for _ in drawn]
    tokens: list[dict[str, tuple[str, ...]]] = [{} for _ in drawn]
    seen: list[Image.Image] = [picture.image for picture in drawn]
    for name, folder in readers.items():
        model = InspectedModel.from_folder(folder, arguments.stage)
        _warn_of_long_captions(name, model, pictures)
        for place, picture in enumerate(drawn):
            sample = model.prepare(picture.image, picture.caption)
            seen[place], tokens[place][name] = sample.image, sample.tokens
            attention[place][name] = attention_maps(model, sample)
            check_style(map_style(arguments), name, sample.tokens, attention[place][name])
            gradients[place][name] = gradient_maps(model, sample)
    updates = {
        name: found
        for name, folder in readers.items()
        if (found := _updates(folder, arguments.stage))
    }
    flows, numbers = {}, {}
    for name, folder in readers.items() if measured else ():
        logger.info("looking into %s", folder)
        # Loaded anew: of several large models one at a time fits into memory.
        model = InspectedModel.from_folder(folder, arguments.stage)
        samples = [model.prepare(picture.image, picture.caption) for picture in measured]
        flows[name] = gradient_flow(model, samples)
        things = [objects.get(picture.name, []) for picture in measured]
        numbers[name] = _attention_numbers(model, samples, things)
    encoders = _encoders(models) if arguments.cka and len(measured) >= FEWEST else {}
    return MapFindings(
        models=dict(models),
        shown=[
            Shown(*parts) for parts in zip(drawn, seen, tokens, gradients, attention, strict=True)
        ],
        flows=flows,
        numbers=numbers,
        updates=updates,
        cka=_compare_encoders(encoders, measured),
        images=len(measured),
        data=data,
        encoder_training={
            name: _encoder_training(readers[name], stages) for name, stages in updates.items()
        },
    )


def map_style(arguments: MapsArguments) -> MapStyle:
    """Give how maps are to be drawn."""
    return MapStyle(arguments.heads, arguments.tokens, arguments.layers, arguments.scale)


def _is_base(folder: str) -> bool:
    return _recipe(folder).get("method") == BASE


def _recipe(folder: str) -> dict[str, Any]:
    path = Path(folder) / "recipe.yaml"
    return read_recipe(path) if path.is_file() else {}


def _base_encoder(folder: str) -> str | None:
    """Which encoder a run began with, as its recipe has it."""
    vision: str | None = _recipe(folder).get("model", {}).get("vision")
    return vision


def _check_base(folder: str, model: Path) -> None:
    """Refuse a run whose base is not where its recipe says: updates are measured from it."""
    vision = _base_encoder(folder)
    if vision is None:
        return
    try:
        load_config(vision, "vision")
    except ValueError as error:
        if Path(vision).exists():
            raise
        remedy = f"give its model, {str(model)!r}, with data=FOLDER"
        raise _not_found(folder, "model.vision", vision, remedy) from error


def _not_found(folder: str, key: str, path: str, remedy: str) -> ValueError:
    return ValueError(
        f"the recipe of {folder!r} has {key} {path!r}, which is not found from "
        f"{str(Path.cwd())!r}: its paths start from where the run was started; run hive-vision "
        f"maps there, or {remedy}"
    )


def _pictures(folder: str, arguments: MapsArguments) -> tuple[list[CaptionedImage], str]:
    """Read the images and captions to look at; and say where they are from."""
    if arguments.image is not None:
        assert arguments.caption is not None
        image = read_image(StoredImage(path=arguments.image, bytes=None), arguments.image)
        return [
            CaptionedImage(Path(arguments.image).name, image, arguments.caption)
        ], arguments.image
    source, path = _open(folder, arguments)
    count = min(max(arguments.samples, arguments.flow_samples), len(source))
    pictures = []
    for row in range(count):
        name = source.image_name(row)
        image = read_image(source.read_image(row), f"{name} of {path}")
        (caption, *_) = source.captions_of(row) or [""]
        pictures.append(CaptionedImage(name, image, caption))
    return pictures, path


def _open(folder: str, arguments: MapsArguments) -> tuple[CaptionSource, str]:
    if arguments.data is not None:
        return _split(Source(path=arguments.data), arguments.split)
    if "train" not in _recipe(folder).get("data", {}):
        raise ValueError(
            f"{folder!r} does not say what captions it was trained on; give data=FOLDER, or "
            "image=FILE and caption=TEXT"
        )
    data = load_recipe(Path(folder) / "recipe.yaml").data
    sources = [*data.validation_sources(), *data.train_sources()]
    try:
        if arguments.split is None:
            return open_parts(data).held_out[0], sources[0].path
        return _split(sources[0], arguments.split)
    except ValueError as error:
        for path in (source.path for source in sources):
            if repr(path) in str(error) and not Path(path).exists():
                raise _not_found(folder, "data", path, "give data=FOLDER") from error
        raise


def _split(source: Source, split: str | None) -> tuple[CaptionSource, str]:
    splits = open_source(source)
    wanted = split or ("validation" if "validation" in splits else "train")
    return choose_split(splits, wanted, source.path), source.path


def _warn_of_long_captions(
    name: str, model: InspectedModel, pictures: Sequence[CaptionedImage]
) -> None:
    cut = [n for p in pictures if (n := model.tokens_left_out(p.caption))]
    if cut:
        logger.warning(
            "%s reads at most %d tokens: %d of %d captions are longer and were cut, by up to %d",
            *(name, model.processor.max_text_tokens, len(cut), len(pictures), max(cut)),
        )


def _attention_numbers(
    model: InspectedModel, samples: Sequence[Sample], objects: Sequence[Sequence[NamedObject]]
) -> AttentionNumbers:
    layers: tuple[int, ...] = ()
    spreads: list[Spread] = []
    pointed: list[Pointing] = []
    for sample, things in zip(samples, objects, strict=True):
        maps = attention_maps(model, sample)
        layers = maps.layers
        spreads.append(attention_spread(maps))
        looks = []
        for thing in things:
            others = [other.words for other in things if other is not thing]
            looks.append(pointing(maps, sample, thing.words, thing.mask, others))
        known = [look for look in looks if look is not None]
        if known:
            pointed.append(mean_pointing(known))
    return AttentionNumbers(
        entropy=np.array([spread.entropy.mean(axis=1) for spread in spreads]),
        distance=np.array([spread.distance.mean(axis=1) for spread in spreads]),
        patches=np.array([spread.patches.mean(axis=1) for spread in spreads]),
        pointing=pointed,
        layers=layers,
    )


def _updates(folder: str, last: str | None) -> dict[str, NDArray[np.float64]]:
    """Relative weight update of each encoder layer in each stage, and from base to the last one."""
    stages = [stage for stage in sorted(STAGES) if (Path(folder) / stage / "model").is_dir()]
    stages = [stage for stage in stages if last is None or stage <= last]
    vision = _base_encoder(folder)
    if not stages or vision is None:
        return {}
    base, found = load_vision_model(vision), {}
    before = base
    for stage in stages:
        after = InspectedModel.from_folder(folder, stage).vision
        found[stage] = weight_updates(before, after)
        before = after
    return {**found, ALL_STAGES: weight_updates(base, before)}


def _encoder_training(folder: str, stages: Iterable[str]) -> str:
    """Say how long and at which rate a run trained its encoder in these stages."""
    said = []
    for stage, plan in _recipe(folder).items():
        rates = plan["rules"] if stage in stages else {}
        found = {k: rate for k, rate in rates.items() if k.startswith("vision_model")}
        if set(found.values()) - {"frozen"}:
            steps, epochs = plan["max_steps"], plan["epochs"]
            length = f"{epochs:g} epochs" if steps is None else f"{steps} steps"
            said.append(f"{stage} {length} at {', '.join(map(str, found.values()))}")
    return "; ".join(said) or "frozen"


def _encoders(models: Mapping[str, str]) -> dict[str, str]:
    """Encoders to compare: the base that the runs began with, and what came out of each."""
    found = {}
    for name, folder in models.items():
        if (Path(folder) / "encoder" / "config.json").is_file():
            found[name] = str(Path(folder) / "encoder")
    bases = {_base_encoder(models[name]) for name in found}
    base = bases.pop() if len(bases) == 1 else None
    if base is not None and BASE not in found:
        found = {BASE: base, **found}
    return found


def _compare_encoders(
    encoders: Mapping[str, str], pictures: Sequence[CaptionedImage]
) -> dict[tuple[str, str], NDArray[np.float64]]:
    images = [picture.image for picture in pictures]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    means = {
        name: layer_means(
            load_vision_model(folder).to(device), load_image_processor(folder), images
        )
        for name, folder in encoders.items()
    }
    return {pair: cka_matrix(means[pair[0]], means[pair[1]]) for pair in combinations(means, 2)}
