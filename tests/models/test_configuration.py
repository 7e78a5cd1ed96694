"""HiveConfig: choices, derived layers, and the way to disk and back."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from hive_vision.models.configuration import HiveConfig
from tests.conftest import text_config, vision_config
from tests.models.helpers import COMBINATIONS

NOT_DEFAULT: dict[str, Any] = {
    "layer_selection": [2, 5, 7],
    "layer_density": 0.5,
    "decoder_layers": [1, 3, 4],
    "projector_hidden_size": 20,
    "projector_norm": False,
    "projector_residual": False,
    "projector_shared": True,
    "cross_attention_gate": "tanh",
    "cross_attention_qk_norm": True,
    "cross_attention_start": "random",
}


def make_config(vision: str = "clip", language: str = "llama", **fusion: Any) -> HiveConfig:
    return HiveConfig(
        vision_config=vision_config(vision), text_config=text_config(language), **fusion
    )


def test_options_listed_here_are_all_options() -> None:
    fields = {name for name in HiveConfig.__annotations__ if not name.endswith("_config")}
    assert set(NOT_DEFAULT) == fields
    plain = HiveConfig()
    assert all(getattr(plain, name) != value for name, value in NOT_DEFAULT.items())


@pytest.mark.parametrize("fusion", [{}, NOT_DEFAULT], ids=["defaults", "not-default"])
@pytest.mark.parametrize(("vision", "language"), COMBINATIONS)
def test_round_trip(vision: str, language: str, fusion: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(vision, language, **fusion)
    config.save_pretrained(tmp_path)
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        HiveConfig.from_pretrained(tmp_path),
        HiveConfig.from_dict(config.to_dict()),
    ):
        assert type(loaded) is HiveConfig
        assert type(loaded.vision_config) is type(config.vision_config)
        assert type(loaded.text_config) is type(config.text_config)
        assert loaded.encoder_layers == config.encoder_layers
        assert loaded.host_layers == config.host_layers
        for name in NOT_DEFAULT:
            assert getattr(loaded, name) == getattr(config, name), name
        for half in ("vision_config", "text_config"):
            ours, theirs = getattr(loaded, half).to_dict(), getattr(config, half).to_dict()
            assert ours == theirs


def test_layers_of_the_papers_models() -> None:
    config = HiveConfig(
        vision_config=transformers.CLIPVisionConfig(num_hidden_layers=24),
        text_config=transformers.LlamaConfig(num_hidden_layers=32),
    )
    assert config.encoder_layers == [4, 8, 12, 16, 20, 24]
    assert config.host_layers == [6, 12, 17, 22, 27, 32]
    config.layer_selection = "later"
    assert config.encoder_layers == [19, 20, 21, 22, 23, 24]
    assert config.host_layers == [6, 12, 17, 22, 27, 32], "decoder depths are always spread"


def test_cascaded_has_the_decoder_depths_of_hive() -> None:
    hive, cascaded = make_config(), make_config(layer_selection="last", projector_shared=True)
    assert cascaded.host_layers == hive.host_layers == [2, 4]
    assert cascaded.encoder_layers == [8, 8]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cross_attention_gate", "cross_attention_gate is 'sigmoid'; allowed are none, tanh"),
        ("cross_attention_start", "cross_attention_start is 'sigmoid'; allowed are host, random"),
    ],
)
def test_unknown_choice(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{name: "sigmoid"})


def test_a_selection_that_does_not_fit_is_refused_when_the_layers_are_read() -> None:
    config = make_config(layer_density=0.75)
    assert len(config.encoder_layers) == 6
    with pytest.raises(ValueError, match="the language model has only 4 layers"):
        _ = config.host_layers
    with pytest.raises(ValueError, match="the encoder has layers 1 to 8"):
        _ = make_config(layer_selection=[4, 9]).encoder_layers
