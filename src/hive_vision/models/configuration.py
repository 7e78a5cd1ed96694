"""Configuration of a HIVE model."""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from hive_vision.models.backbones import load_config
from hive_vision.models.layer_selection import (
    Selection,
    select_decoder_layers,
    select_encoder_layers,
)


class HiveConfig(PreTrainedConfig):
    """What a [`HiveForConditionalGeneration`] is made of: two backbones and how they are joined.

    Args:
        vision_config: Configuration of the encoder (CLIP, SigLIP, DINOv2, ViT, ...), vision half
            only.
        text_config: Configuration of the causal language model.
        layer_selection: ``uniform``, ``later``, ``last`` or 1-based encoder layers
            (paper sections 3.2, 4.5 and 6; see ``select_encoder_layers``).
        layer_density: |S| / L, the paper's 25%.
        decoder_layers: 1-based language-model layers that attend to the image; spread evenly
            if not given.
        projector_hidden_size: Width of the projector's hidden layer; the language model's width
            if not given.
        projector_norm: LayerNorm before the projector's MLP.
        projector_residual: Residual connection around the MLP, a linear skip where widths differ.
        projector_shared: One projector for all selected layers instead of one each.
        cross_attention_gate: ``none``, or ``tanh`` for a learned gate that starts at zero.
        cross_attention_qk_norm: RMSNorm on each head's queries and keys.
        cross_attention_start: ``host`` copies the projections of the self-attention in front of
            which a cross-attention stands; ``random`` does not.

    Raises:
        ValueError: If a choice is not one of those above. Whether the selection fits the
            backbones is checked where the layers are read.
    """

    model_type = "hive_vision"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    layer_selection: Selection = "uniform"
    layer_density: float = 0.25
    decoder_layers: list[int] | None = None
    projector_hidden_size: int | None = None
    projector_norm: bool = True
    projector_residual: bool = True
    projector_shared: bool = False
    cross_attention_gate: Literal["none", "tanh"] = "none"
    cross_attention_qk_norm: bool = False
    cross_attention_start: Literal["host", "random"] = "host"

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn the backbones' dictionaries into configurations and check the choices."""
        self.vision_config = _as_config(self.vision_config)
        if self.vision_config is not None:
            self.vision_config = load_config(self.vision_config, "vision")
        self.text_config = _as_config(self.text_config)
        for name, allowed in (
            ("cross_attention_gate", ("none", "tanh")),
            ("cross_attention_start", ("host", "random")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
        super().__post_init__(**kwargs)

    @property
    def encoder_layers(self) -> list[int]:
        """S: for each cross-attention the 1-based encoder layer that feeds it."""
        return select_encoder_layers(
            self.vision_config.num_hidden_layers, self.layer_selection, self.layer_density
        )

    @property
    def host_layers(self) -> list[int]:
        """For each cross-attention the 1-based language-model layer in front of which it stands."""
        return select_decoder_layers(
            self.text_config.num_hidden_layers, len(self.encoder_layers), self.decoder_layers
        )


def _as_config(
    config: dict[str, Any] | PreTrainedConfig | None,
) -> PreTrainedConfig | None:
    if not isinstance(config, dict):
        return config
    return AutoConfig.for_model(**config)


AutoConfig.register(HiveConfig.model_type, HiveConfig)
