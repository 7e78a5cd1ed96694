"""Mean patch features against transformers' own hidden states."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hive_vision.evaluation.features import mean_patch_features
from hive_vision.models.backbones import load_vision_model

PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "vit": 1, "dinov3": 5, "aimv2": 0}


@pytest.fixture(scope="module")
def labelled() -> datasets.Dataset:
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(7)
    ]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [3, 1, 4, 1, 5, 9, 2]},
        features=datasets.Features(
            {"image": datasets.Image(mode="RGB"), "label": datasets.Value("int32")}
        ),
    )


@pytest.mark.parametrize("family", PREFIX_TOKENS)
def test_last_hidden_states_without_prefix(
    family: str, backbone_folders: dict[str, Path], labelled: datasets.Dataset
) -> None:
    folder = backbone_folders[family]
    model = load_vision_model(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(list(labelled["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1
    patches = hidden[-1][:, PREFIX_TOKENS[family] :]
    assert patches.shape[1] == 16
    features, labels = mean_patch_features(folder, labelled)
    np.testing.assert_allclose(features, patches.mean(dim=1).numpy(), atol=1e-5)
    assert labels.tolist() == [3, 1, 4, 1, 5, 9, 2]
    assert (features.dtype, labels.dtype) == (np.float32, np.int64)


@torch.no_grad()
def test_timm_without_its_own_hidden_states(
    backbone_folders: dict[str, Path], labelled: datasets.Dataset
) -> None:
    folder = backbone_folders["timm"]
    model = load_vision_model(folder).timm_model.eval()
    pixel_values = AutoImageProcessor.from_pretrained(folder)(list(labelled["image"]))
    tokens = model.patch_embed(pixel_values["pixel_values"])
    tokens = model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(tokens))))
    features, _ = mean_patch_features(folder, labelled)
    np.testing.assert_allclose(features, tokens[:, 1:].mean(dim=1).numpy(), atol=1e-5)


def test_padding_of_images_is_no_feature(
    backbone_folders: dict[str, Path], tmp_path: Path, labelled: datasets.Dataset
) -> None:
    """The same patches in longer padding give the same features."""
    folder = shutil.copytree(backbone_folders["naflex"], tmp_path / "naflex")
    processor = AutoImageProcessor.from_pretrained(folder, max_num_patches=23)
    processor.save_pretrained(folder)
    features, _ = mean_patch_features(folder, labelled)
    model = load_vision_model(folder).eval()
    for row, image in enumerate(labelled["image"]):
        inputs = trim(processor([image], return_tensors="pt"))
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(features[row], hidden[0].mean(dim=0).numpy(), atol=1e-5)


def trim(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut the padding of one image."""
    used = int(images["pixel_attention_mask"].sum())
    assert used < images["pixel_attention_mask"].shape[1], "or there is nothing to show"
    return {n: v if n == "spatial_shapes" else v[:, :used] for n, v in images.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_change_nothing(
    backbone_folders: dict[str, Path], labelled: datasets.Dataset, batch_size: int
) -> None:
    whole, _ = mean_patch_features(backbone_folders["clip"], labelled)
    features, labels = mean_patch_features(backbone_folders["clip"], labelled, batch_size)
    np.testing.assert_allclose(features, whole, atol=1e-5)
    assert len(labels) == len(features) == 7


def test_reading_features_is_not_training(
    backbone_folders: dict[str, Path], labelled: datasets.Dataset, tmp_path: Path
) -> None:
    # Dropout would show: the encoder must be in evaluation mode.
    model = AutoModel.from_pretrained(backbone_folders["vit"])
    model.config.hidden_dropout_prob = 0.5
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(backbone_folders["vit"]).save_pretrained(tmp_path)
    first, _ = mean_patch_features(tmp_path, labelled)
    second, _ = mean_patch_features(tmp_path, labelled)
    np.testing.assert_array_equal(first, second)
    plain, _ = mean_patch_features(backbone_folders["vit"], labelled)
    np.testing.assert_allclose(first, plain, atol=1e-5)


def test_no_such_encoder(labelled: datasets.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere") as failure:
        mean_patch_features(tmp_path / "nowhere", labelled)
    assert "\n" not in str(failure.value)
