"""The model of a recipe from configurations: a folder's, those of this package, or the hub's."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from hive_vision.models.backbones import load_config
from hive_vision.studies import recipe_model as recipe_model_module
from hive_vision.studies.recipe_model import backbone_config, recipe_model
from hive_vision.training.recipes import load_recipe, recipe_names
from tests.conftest import text_config
from tests.training.conftest import recipe

__all__ = ["recipe"]  # the fixture


@pytest.mark.parametrize("name", [name for name in recipe_names() if "l1" in name])
def test_backbones_of_every_large_recipe_are_known_without_a_network(name: str) -> None:
    model = load_recipe(name).model
    vision = backbone_config(model.vision, "vision")
    language = backbone_config(model.language, "language")
    assert (vision.hidden_size, vision.num_hidden_layers) == (1024, 24)
    assert (language.hidden_size, language.num_hidden_layers) == (960, 32)


def test_a_folder_is_read_before_what_the_package_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text_config("llama", layers=3).save_pretrained("facebook/MobileLLM-350M")
    assert backbone_config("facebook/MobileLLM-350M", "language").num_hidden_layers == 3


def test_the_hub_is_not_asked_for_what_the_package_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def load(source: str, role: str) -> PreTrainedConfig:
        read.append(source)
        return load_config(source, role)

    monkeypatch.setattr(recipe_model_module, "load_config", load)
    backbone_config("facebook/MobileLLM-350M", "language")
    assert [Path(source).is_dir() for source in read] == [True]


@pytest.mark.parametrize("source", ["nobody/nothing", "google", "../recipes"])
def test_unknown_ones_are_refused_as_everywhere(source: str) -> None:
    with pytest.raises(ValueError, match="vision backbone") as error:
        backbone_config(source, "vision")
    with pytest.raises(ValueError, match="vision backbone") as usual:
        load_config(source, "vision")
    assert str(error.value) == str(usual.value)


@pytest.mark.parametrize("method", ["hive", "cascaded", "sa"])
def test_meta_and_real_models_have_the_same_shapes(recipe, method: str) -> None:
    arguments = recipe(method=method)
    meta, images, placeholders = recipe_model(arguments)
    real, real_images, real_placeholders = recipe_model(arguments, "cpu", side=24)
    assert placeholders == (16 if method == "sa" else 0)  # 32 pixels in patches of 8
    assert real_placeholders == (9 if method == "sa" else 0)
    assert images["pixel_values"].shape == (1, 3, 32, 32)
    assert real_images["pixel_values"].shape == (1, 3, 24, 24)
    shapes = {name: p.shape for name, p in meta.named_parameters() if "position" not in name}
    assert shapes == {n: p.shape for n, p in real.named_parameters() if "position" not in n}
    assert all(p.is_meta for p in meta.parameters())
    assert all(torch.isfinite(p).all() for p in real.parameters())
