"""An image processor in two parts against the whole one: equal to the bit, or not split."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hive_vision.models.pixels import SplitProcessor
from hive_vision.models.processing import load_image_processor
from tests.conftest import vision_config

SIZE = {"height": 48, "width": 48}
TORCHVISION = {
    "clip": transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=SIZE),
    "siglip": transformers.SiglipImageProcessor(size=SIZE),
    "dinov2": transformers.BitImageProcessor(  # as DINOv2's folders on the hub say it
        size={"shortest_edge": 56},
        crop_size=SIZE,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "vit": transformers.ViTImageProcessor(size=SIZE),
    "only rescaled": transformers.ViTImageProcessor(size=SIZE, do_normalize=False),
    "another factor": transformers.ViTImageProcessor(size=SIZE, rescale_factor=1 / 127.5),
}


def photos() -> list[Image.Image]:
    random = np.random.default_rng(1)
    shapes = [(90, 60, 3), (60, 90, 3), (48, 48, 3), (31, 200, 3)]
    return [Image.fromarray(random.integers(0, 256, s, dtype=np.uint8)) for s in shapes]


@pytest.mark.parametrize("name", TORCHVISION)
def test_parts_make_what_the_whole_makes(name: str) -> None:
    processor = TORCHVISION[name]
    split = pickle.loads(pickle.dumps(SplitProcessor(processor)))  # as a worker may get it
    assert split.is_split
    whole, parts = processor(photos(), return_tensors="pt"), split(photos())
    assert parts["pixel_values"].dtype == torch.uint8
    assert parts["pixel_values"].nbytes * 4 == whole["pixel_values"].nbytes
    given = split.normalize({**parts, "input_ids": 5})
    assert given.pop("input_ids") == 5
    assert given.keys() == whole.keys()
    assert given["pixel_values"].dtype == torch.float32
    assert given["pixel_values"].stride() == whole["pixel_values"].stride()
    assert torch.equal(given["pixel_values"], whole["pixel_values"])
    again = split.normalize(given)["pixel_values"]
    assert again is given["pixel_values"]  # already done


class _Cut(transformers.ViTImageProcessor):
    """Reads the floats once they are normalised, as no part of it can before."""

    def _preprocess(self, images: Any, **options: Any) -> Any:
        inputs = super()._preprocess(images, **options)
        return transformers.BatchFeature({"pixel_values": inputs["pixel_values"].clip(0)})


def unsplit(name: str, backbone_folders: dict[str, Path]) -> Any:
    match name:
        case "naflex":
            return load_image_processor(backbone_folders["naflex"])
        case "timm":
            architecture = vision_config("timm")
            return transformers.models.timm_wrapper.TimmWrapperImageProcessor(
                architecture.pretrained_cfg, architecture.architecture
            )
        case "pil":
            return transformers.AutoImageProcessor.from_pretrained(
                backbone_folders["siglip"], backend="pil"
            )
        case "dinov3":  # rescales before it resizes
            return transformers.DINOv3ViTImageProcessor(size=SIZE)
        case "efficientnet":  # rescales in a way of its own
            return transformers.EfficientNetImageProcessor(size=SIZE, rescale_offset=True)
    return _Cut(size=SIZE)


@pytest.mark.parametrize("name", ["naflex", "timm", "pil", "dinov3", "efficientnet", "cut"])
def test_what_cannot_be_split_stays_whole(name: str, backbone_folders: dict[str, Path]) -> None:
    processor = unsplit(name, backbone_folders)
    split = SplitProcessor(processor)
    assert not split.is_split
    whole, given = processor(photos(), return_tensors="pt"), split.normalize(split(photos()))
    assert given.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(given[key], value)


def test_inputs_without_images_stay() -> None:
    assert SplitProcessor(TORCHVISION["vit"]).normalize({"labels": 1}) == {"labels": 1}
