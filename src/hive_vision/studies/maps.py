"""Look inside of trained models: maps of samples, and numbers over a data set.

Shapes: n samples, L encoder layers, S attending layers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

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
from hive_vision.analysis.findings import ALL_STAGES, AttentionNumbers, Findings, Picture, Shown
from hive_vision.analysis.gradient_flow import gradient_flow, weight_updates
from hive_vision.analysis.inspection import STAGES, InspectedModel, Sample
from hive_vision.analysis.maps import AttentionMaps, GradientMaps, attention_maps, gradient_maps
from hive_vision.data.images import StoredImage, decode_image
from hive_vision.data.miniature.truth import NamedObject, read_named_objects
from hive_vision.data.sources import CaptionSource, Source, choose_split, open_source
from hive_vision.models.backbones import load_vision_model
from hive_vision.models.processing import load_image_processor
from hive_vision.reporting.run_facts import read_recipe
from hive_vision.training.recipes import load_recipe
from hive_vision.training.run_data import open_parts

logger = logging.getLogger(__name__)

BASE = "base"


@dataclass(frozen=True)
class MapsArguments:
    """What to look at.

    Args:
        image: One image file, with its caption, instead of samples of a data set.
        caption: Its caption.
        data: Captioned images, as recipes take them; the first run's held-out ones if null.
        split: Split of the data; validation if there is one.
        masks: Folder with masks of the same images, as the miniature has them: do words look at
            what they name?
        samples: Samples of the data that maps are drawn of.
        flow_samples: Samples that numbers are measured over; 0 for none.
        stage: Which stage's models; the last finished ones if null.
        heads: mean or max of all heads, or the number of one.
        tokens: Words whose attention is shown; some of the caption's if empty.
        layers: Attending language-model layers that are shown; at most six, evenly, if empty.
        scale: own stretches each map by itself, shared all of a figure alike.
        cka: Compare the layers of encoders with each other and the base, from four samples on.
    """

    image: str | None = None
    caption: str | None = None
    data: str | None = None
    split: str | None = None
    masks: str | None = None
    samples: int = 3
    flow_samples: int = 64
    stage: Literal["stage1", "stage2", "stage3"] | None = None
    heads: Literal["mean", "max"] | int = "mean"
    tokens: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    scale: Literal["own", "shared"] = "own"
    cka: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if (self.image is None) != (self.caption is None):
            raise ValueError("image and caption belong together; give both, or data=FOLDER")
        if self.caption is not None and not self.caption.strip():
            raise ValueError("caption is empty; there is no loss to differentiate")
        if self.image is not None and self.data is not None:
            raise ValueError("give image and caption, or data; not both")
        for name, least in (("samples", 0), ("flow_samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.image is None and not (self.samples or self.flow_samples):
            raise ValueError("samples and flow_samples are 0: there is nothing to look at")
        if self.flow_samples == 1:
            raise ValueError("flow_samples is 1; give at least 2, so that there is an interval")
        if self.masks is not None and self.image is not None:
            raise ValueError("masks are of a data set; give data instead of image")


def look_inside(models: Mapping[str, str], arguments: MapsArguments) -> Findings:
    """Draw and measure one model after another.

    Args:
        models: Name -> run folder or model folder; runs of method base have an encoder only.
        arguments: What to look at.

    Raises:
        ValueError: If a model or the data cannot be read, or there is nothing to look at.
    """
    readers = {name: folder for name, folder in models.items() if not _is_base(folder)}
    if not readers:
        raise ValueError("maps: no model reads captions; give a run of hive, cascaded or sa")
    pictures, data = _pictures(next(iter(readers.values())), arguments)
    updates = {
        name: found
        for name, folder in readers.items()
        if (found := _updates(folder, arguments.stage))
    }
    drawn = pictures[: arguments.samples] if arguments.image is None else pictures
    measured = pictures[: arguments.flow_samples] if arguments.image is None else []
    gradients: list[dict[str, GradientMaps]] = [{} for _ in drawn]
    attention: list[dict[str, AttentionMaps]] = [{} for _ in drawn]
    tokens: list[dict[str, tuple[str, ...]]] = [{} for _ in drawn]
    seen: list[Image.Image] = [picture.image for picture in drawn]
    objects = {}
    if arguments.masks is not None:
        names = [picture.name for picture in measured]
        objects = read_named_objects(Path(data), Path(arguments.masks), names)
    flows, numbers = {}, {}
    for name, folder in readers.items():
        logger.info("looking into %s", folder)
        model = InspectedModel.from_folder(folder, arguments.stage)
        for place, picture in enumerate(drawn):
            sample = model.prepare(picture.image, picture.caption)
            seen[place], tokens[place][name] = sample.image, sample.tokens
            gradients[place][name] = gradient_maps(model, sample)
            attention[place][name] = attention_maps(model, sample)
        if measured:
            samples = [model.prepare(picture.image, picture.caption) for picture in measured]
            flows[name] = gradient_flow(model, samples)
            things = [objects.get(picture.name, []) for picture in measured]
            numbers[name] = _attention_numbers(model, samples, things)
    encoders = _encoders(models) if arguments.cka and len(measured) >= FEWEST else {}
    return Findings(
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
    )


def _is_base(folder: str) -> bool:
    return _recipe(folder).get("method") == BASE


def _recipe(folder: str) -> dict[str, Any]:
    path = Path(folder) / "recipe.yaml"
    return read_recipe(path) if path.is_file() else {}


def _pictures(folder: str, arguments: MapsArguments) -> tuple[list[Picture], str]:
    """Read the images and captions to look at; and say where they are from."""
    if arguments.image is not None:
        assert arguments.caption is not None
        image = decode_image(StoredImage(path=arguments.image, bytes=None))
        return [Picture(Path(arguments.image).name, image, arguments.caption)], arguments.image
    source, path = _open(folder, arguments)
    count = min(max(arguments.samples, arguments.flow_samples), len(source))
    pictures = []
    for row in range(count):
        image = decode_image(source.read_image(row))
        (caption, *_) = source.captions_of(row) or [""]
        pictures.append(Picture(source.image_name(row), image, caption))
    return pictures, path


def _open(folder: str, arguments: MapsArguments) -> tuple[CaptionSource, str]:
    if arguments.data is None and "train" not in _recipe(folder).get("data", {}):
        raise ValueError(
            f"{folder!r} does not say what captions it was trained on; give data=FOLDER, or "
            "image=FILE and caption=TEXT"
        )
    if arguments.data is None:
        data = load_recipe(Path(folder) / "recipe.yaml").data
        source = (data.validation_sources() or data.train_sources())[0]
        if arguments.split is None:
            return open_parts(data).held_out[0], source.path
    else:
        source = Source(path=arguments.data)
    splits = open_source(source)
    wanted = arguments.split or ("validation" if "validation" in splits else "train")
    return choose_split(splits, wanted, source.path), source.path


def _attention_numbers(
    model: InspectedModel, samples: Sequence[Sample], objects: Sequence[Sequence[NamedObject]]
) -> AttentionNumbers:
    spreads: list[Spread] = []
    pointed: list[Pointing] = []
    for sample, things in zip(samples, objects, strict=True):
        maps = attention_maps(model, sample)
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
    )


def _updates(folder: str, last: str | None) -> dict[str, NDArray[np.float64]]:
    """Relative weight update of each encoder layer in each stage, and from base to the last one."""
    stages = [stage for stage in sorted(STAGES) if (Path(folder) / stage / "model").is_dir()]
    stages = [stage for stage in stages if last is None or stage <= last]
    vision = _recipe(folder).get("model", {}).get("vision")
    if not stages or vision is None:
        return {}
    base, found = load_vision_model(vision), {}
    before = base
    for stage in stages:
        after = InspectedModel.from_folder(folder, stage).vision
        found[stage] = weight_updates(before, after)
        before = after
    return {**found, ALL_STAGES: weight_updates(base, before)}


def _encoders(models: Mapping[str, str]) -> dict[str, str]:
    """Encoders to compare: the base that the runs began with, and what came out of each."""
    found = {}
    for name, folder in models.items():
        if (Path(folder) / "encoder" / "config.json").is_file():
            found[name] = str(Path(folder) / "encoder")
    bases = {_recipe(models[name]).get("model", {}).get("vision") for name in found}
    base = bases.pop() if len(bases) == 1 else None
    if base is not None and BASE not in found:
        found = {BASE: base, **found}
    return found


def _compare_encoders(
    encoders: Mapping[str, str], pictures: Sequence[Picture]
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
