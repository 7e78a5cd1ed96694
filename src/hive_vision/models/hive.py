"""The HIVE model: a language model that cross-attends to an encoder at matching depths.

Shapes: B captions of I images (one each, unless told which), T text tokens, N image tokens
(prefix included), D encoder width, E language-model width, S selected layers, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from hive_vision.models.backbones import (
    Source,
    capture_block_outputs,
    find_blocks,
    join_configs,
    load_language_model,
    load_vision_model,
)
from hive_vision.models.configuration import HiveConfig
from hive_vision.models.cpu_attention import CPU_ATTENTION
from hive_vision.models.cross_attention import (
    AttendBeforeLayer,
    CrossAttention,
    TanhGate,
    ZeroLinear,
    host_projections,
)
from hive_vision.models.loss import language_logits, largest_logits, next_token_loss
from hive_vision.models.projector import Projector
from hive_vision.naming import unknown_name


@dataclass
class HiveOutput(ModelOutput):
    """What ``HiveForConditionalGeneration.forward`` returns.

    Attributes:
        loss: Scalar, if labels were given.
        logits: (B, T, V), or fewer positions with ``logits_to_keep``.
        past_key_values: The language model's cache.
        hidden_states: The language model's, if asked for.
        attentions: The language model's self-attention weights, if asked for.
        cross_attentions: For each selected depth the weights (B, heads, T, N), if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class HiveForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Encoder, projectors, cross-attentions and language model (paper section 3).

    The two backbones stay what they are: ``vision_model`` is the plain encoder,
    ``language_model`` the plain causal language model with its own state-dict keys. In front
    of chosen language-model layers stands a [`CrossAttention`] to the projected output of
    the encoder layer of matching depth.

    Args:
        config: Both backbones' configurations and the fusion options.
        vision_model: The encoder; made from the configuration if not given.
        language_model: The language model; made from the configuration if not given.

    Raises:
        ValueError: If the layer selection does not fit the backbones.
    """

    config_class = HiveConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # forward divides by num_items_in_batch
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CrossAttention"]

    def __init__(
        self,
        config: HiveConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_model = vision_model or AutoModel.from_config(config.vision_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        count = len(config.host_layers)
        self.projectors = nn.ModuleList(
            Projector(
                vision_size,
                config.projector_hidden_size or text_size,
                text_size,
                norm=config.projector_norm,
                residual=config.projector_residual,
            )
            for _ in range(1 if config.projector_shared else count)
        )
        layers = self._language_layers()
        projections = host_projections(layers[0])
        bias = projections is not None and projections["q_proj"].bias is not None
        self.cross_attentions = nn.ModuleList(
            CrossAttention(config, bias=bias) for _ in range(count)
        )
        self._attach_cross_attentions(layers)
        self.post_init()

    @classmethod
    def from_backbones(cls, vision: Source, language: Source, **fusion: Any) -> Self:
        """Join two backbones.

        Args:
            vision: Encoder: hub id, local folder or configuration (then random). Of a dual
                encoder (CLIP, SigLIP) the vision half is taken.
            language: Causal language model, given likewise.
            **fusion: Options of [`HiveConfig`].

        Raises:
            ValueError: If a backbone cannot be loaded completely, an option is unknown, or the
                selection does not fit.
        """
        allowed = [name for name in HiveConfig.__annotations__ if not name.endswith("_config")]
        for name in fusion:
            if name not in allowed:
                raise ValueError(unknown_name("fusion option", name, allowed))
        vision_model, language_model = load_vision_model(vision), load_language_model(language)
        config = join_configs(HiveConfig, vision_model.config, language_model.config, **fusion)
        model = cls(config, vision_model, language_model)
        model.generation_config = language_model.generation_config
        if config.cross_attention_start == "host":
            layers = model._language_layers()
            for number, block in zip(config.host_layers, model.cross_attentions, strict=True):
                assert isinstance(block, CrossAttention)
                block.copy_from_host(layers[number - 1])
        return model

    def _language_layers(self) -> nn.ModuleList | nn.Sequential:
        return find_blocks(self.language_model, self.config.text_config.num_hidden_layers)

    def _attach_cross_attentions(self, layers: nn.ModuleList | nn.Sequential) -> None:
        hosts = {number: index for index, number in enumerate(self.config.host_layers)}
        for number, layer in enumerate(layers, start=1):
            index = hosts.get(number)
            hook = AttendBeforeLayer(index, None if index is None else self.cross_attentions[index])
            layer.register_forward_pre_hook(hook, with_kwargs=True)

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier for the fusion's linear layers; what must start at zero knows it itself."""
        if isinstance(module, ZeroLinear | TanhGate | nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> Any:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The language model's output projection."""
        return self.language_model.get_output_embeddings()

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the encoder's own way: a timm model has another switch."""
        super()._set_gradient_checkpointing(*args, **kwargs)
        if self.vision_model.supports_gradient_checkpointing:
            self.vision_model._set_gradient_checkpointing(*args, **kwargs)

    def get_encoder_features(self, pixel_values: Tensor, **padding: Any) -> dict[int, Tensor]:
        """Run the encoder: ``l -> F_l`` (B, N, D) for the selected 1-based layers l.

        Args:
            pixel_values: Images (B, C, H, W), or what the encoder reads instead.
            **padding: What else the image processor gives for this encoder.
        """
        layers = self.config.encoder_layers
        blocks = find_blocks(self.vision_model, self.config.vision_config.num_hidden_layers)
        with capture_block_outputs(blocks, layers) as features:
            self.vision_model(pixel_values, **padding)
        return features

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Give what is read of images (I, C, H, W), kept while the encoder is frozen.

        Returns:
            (I, S, N, D), the S different selected layers in ascending order.
        """
        features = self.get_encoder_features(pixel_values)
        return torch.stack([features[layer] for layer in sorted(features)], dim=1)

    def get_image_features(self, pixel_values: Tensor, **padding: Any) -> tuple[Tensor, ...]:
        """Encode and project images (B, C, H, W): for each cross-attention (B, N, E).

        Args:
            pixel_values: As for ``get_encoder_features``.
            **padding: Likewise; its ``pixel_attention_mask`` is the features' mask.
        """
        return self._project(self.get_encoder_features(pixel_values, **padding))

    def _project(self, features: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        layers = self.config.encoder_layers
        if not self.config.projector_shared:
            return tuple(
                g(features[layer]) for g, layer in zip(self.projectors, layers, strict=True)
            )
        projected = {layer: self.projectors[0](features[layer]) for layer in set(layers)}
        return tuple(projected[layer] for layer in layers)

    def _attended(
        self,
        text: Tensor | None,
        image_features: Tensor | Sequence[Tensor],
        mask: Tensor | None,
        index: Tensor | None,
    ) -> dict[str, Any]:
        """What the cross-attentions find among the language model's arguments."""
        if isinstance(image_features, Tensor):
            image_features = image_features.unbind(1)
        _check_pairs(text, image_features[0] if index is None else index)
        found: dict[str, Any] = {"image_features": tuple(image_features)}
        if mask is not None:
            found["image_mask"] = self._image_mask(mask)
        if index is not None:
            found["image_index"] = index
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        use_cache: bool | None = None,
        output_cross_attentions: bool = False,
        return_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_features_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        encoder_features: Tensor | None = None,
        **kwargs: Any,
    ) -> HiveOutput:
        """Read captions while looking at images.

        Args:
            input_ids: Caption tokens (B, T).
            pixel_values: Images (I, C, H, W), or patches (I, N, C * P * P) where the encoder
                reads images of any shape. Without images this is the plain language model.
            attention_mask: 1 for tokens, 0 for padding (B, T).
            labels: (B, T), -100 where nothing is to be predicted.
            position_ids: (B, T).
            past_key_values: Cache of earlier tokens.
            inputs_embeds: (B, T, E) instead of ``input_ids``.
            image_features: What ``get_image_features`` returned, instead of ``pixel_values``;
                a tuple of (I, N, E) or one tensor (I, S, N, E).
            use_cache: Return the cache.
            output_cross_attentions: Return the cross-attention weights.
            return_logits: ``False`` saves computing logits that only the loss needed.
            logits_to_keep: Compute logits of this many last positions (or of these positions).
            num_items_in_batch: Supervised tokens of the global batch, see ``next_token_loss``.
            pixel_attention_mask: 1 for patches, 0 for padding (I, N), where images are padded.
            spatial_shapes: Rows and columns of patches (I, 2), likewise.
            image_features_mask: The mask that belongs to ``image_features`` (I, N), if any.
            image_index: Which of the I images each caption belongs to (B,), so that an image is
                encoded once for its captions; if not given, each has one.
            encoder_features: What ``encode_images`` gave, instead of ``pixel_values``.
            **kwargs: Handed to the language model.
        """
        if pixel_values is not None and image_features is None:
            image_features = self.get_image_features(
                pixel_values, **_padding(pixel_attention_mask, spatial_shapes)
            )
            image_features_mask = pixel_attention_mask
        elif encoder_features is not None:
            layers = sorted(set(self.config.encoder_layers))
            kept = encoder_features.to(self.dtype).unbind(1)
            image_features = self._project(dict(zip(layers, kept, strict=True)))
        weights: list[Tensor] | None = None
        if image_features is not None:
            text = input_ids if inputs_embeds is None else inputs_embeds
            kwargs |= self._attended(text, image_features, image_features_mask, image_index)
            if output_cross_attentions:
                kwargs["cross_attention_weights"] = weights = []
        outputs = self.language_model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        head = partial(
            language_logits,
            output_embeddings=self.get_output_embeddings(),
            text_config=self.config.text_config,
        )
        loss = None
        if labels is not None:
            loss = next_token_loss(
                hidden,
                labels,
                head,
                self.config.text_config.vocab_size,
                num_items_in_batch,
                largest_logits(self.get_output_embeddings()),
            )
        logits = None
        if return_logits:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = head(hidden[:, keep])
        return HiveOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=None if weights is None else tuple(weights),
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Write captions; as in transformers, but every image is encoded only once.

        Args:
            inputs: Prompt tokens (B, T), left-padded; or pass ``input_ids``.
            **kwargs: ``pixel_values`` and everything that ``GenerationMixin.generate`` takes.
        """
        pixel_values, mask, shapes = (
            kwargs.pop(name, None)
            for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        )
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, **_padding(mask, shapes))
            kwargs["image_features"] = torch.stack(features, dim=1)
            if mask is not None:  # under its own name it would be dropped after the first token
                kwargs["image_features_mask"] = mask
        return super().generate(inputs, **kwargs)

    def _image_mask(self, features_mask: Tensor) -> Tensor:
        """(B, N) of 0 and 1 to what sdpa and eager attention take, (B, 1, 1, N) of booleans."""
        if self.config._attn_implementation not in ("sdpa", "eager", CPU_ATTENTION):
            raise ValueError(
                f"attention {self.config._attn_implementation!r} cannot leave out the padding of "
                "images of different shapes; set attn_implementation to sdpa or eager"
            )
        return features_mask.bool()[:, None, None]


def _padding(mask: Tensor | None, shapes: Tensor | None) -> dict[str, Any]:
    """What an encoder of images of any shape is called with; nothing for those of one size."""
    return {} if shapes is None else {"pixel_attention_mask": mask, "spatial_shapes": shapes}


def _check_pairs(text: Tensor | None, image: Tensor) -> None:
    if text is not None and len(text) != len(image):
        raise ValueError(
            f"{len(image)} images for {len(text)} captions; give one for each, or image_index"
        )


AutoModel.register(HiveConfig, HiveForConditionalGeneration)
AutoModelForImageTextToText.register(HiveConfig, HiveForConditionalGeneration)
