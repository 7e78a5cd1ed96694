"""The ``sa`` baseline: LLaVA-style concatenation of image and text tokens.

It *is* transformers' ``LlavaForConditionalGeneration``; only the loss is computed as in the
other methods (supervised positions only, global token count), so that the comparison is fair.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaMultiModalProjector,
)

from hive_vision.conversation import IMAGE_TOKEN
from hive_vision.models.backbones import (
    Source,
    blank_image,
    image_token_counts,
    join_configs,
    load_language_model,
    load_vision_model,
)
from hive_vision.models.cross_attention import rows_of_images
from hive_vision.models.loss import largest_logits, next_token_loss


def image_token_id(tokenizer: Any) -> int:
    """Give the id of the image placeholder, which is added to a tokenizer that has none."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


class SelfAttentionForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with this package's loss; saved, it is a stock LLaVA checkpoint."""

    accepts_loss_kwargs = True  # forward divides by num_items_in_batch

    @classmethod
    def from_backbones(
        cls, vision: Source, language: Source, image_token_id: int, feature_layer: int = -1
    ) -> Self:
        """Join two backbones the LLaVA way.

        Args:
            vision: Encoder: hub id, local folder or configuration (then random).
            language: Causal language model, given likewise.
            image_token_id: Id of the placeholder token; a row is added if there is none for it.
            feature_layer: Which of the encoder's hidden states is read: -1 is the last block's
                output, -2 (LLaVA's choice, paper recipes) the one before.

        Raises:
            ValueError: If a backbone cannot be loaded completely, or if LLaVA cannot hold it.
        """
        vision_model, language_model = load_vision_model(vision), load_language_model(language)
        _check_hidden_states(vision_model.config)
        embeddings = "embed_tokens.weight"
        if (
            language_model.config.tie_word_embeddings
            and embeddings not in language_model.base_model.state_dict()
        ):
            raise ValueError(
                f"method sa is transformers' LLaVA, which cannot tie the embeddings of a "
                f"{type(language_model).__name__}; use another language model or another method"
            )
        if image_token_id >= language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(image_token_id + 1)
        grid, prefix = image_token_counts(vision_model.config)
        # LLaVA can leave out exactly one leading token, CLS; all others stay.
        drops_cls = prefix == 1
        config = join_configs(
            LlavaConfig,
            vision_model.config,
            language_model.config,
            image_token_index=image_token_id,
            image_seq_length=grid if drops_cls else grid + prefix,
            vision_feature_layer=feature_layer,
            vision_feature_select_strategy="default" if drops_cls else "full",
        )
        with torch.device("meta"):
            model = cls(config)
        model.model.vision_tower = vision_model
        model.model.language_model = language_model.base_model
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)
        model.lm_head = language_model.get_output_embeddings()
        model.generation_config = language_model.generation_config
        return model

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Give what the connector reads of images (I, C, H, W), kept while the encoder is frozen.

        Returns:
            (I, 1, N, D).
        """
        seen: list[Tensor] = []

        def keep(connector: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        with self.model.multi_modal_projector.register_forward_pre_hook(keep):
            self.model.get_image_features(pixel_values)
        return seen[0][:, None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        image_index: Tensor | None = None,
        encoder_features: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """As in transformers; ``return_logits=False`` saves computing what only the loss needs.

        With ``image_index`` (B,), which of the images each caption belongs to, an image is encoded
        once for all of its captions. ``encoder_features`` are what ``encode_images`` gave, instead
        of ``pixel_values``.
        """

        def of_captions(connector: nn.Module, args: Any, features: Tensor) -> Tensor | None:
            return None if image_index is None else rows_of_images(features, image_index)

        # What leaves the connector is put in the placeholders' places, one image after another.
        with self.model.multi_modal_projector.register_forward_hook(of_captions):
            if encoder_features is not None:
                kwargs["inputs_embeds"] = self._embed(input_ids, encoder_features)
                input_ids = None
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                **kwargs,
            )
        hidden = outputs.last_hidden_state
        loss = None
        if labels is not None:
            loss = next_token_loss(
                hidden,
                labels,
                self.lm_head,
                self.config.text_config.vocab_size,
                num_items_in_batch,
                largest_logits(self.lm_head),
            )
        logits = None
        if return_logits:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _embed(self, input_ids: Tensor | None, encoder_features: Tensor) -> Tensor:
        """Put connected features in the placeholders' places, as LLaVA does."""
        embedded: Tensor = self.get_input_embeddings()(input_ids)
        connected = self.model.multi_modal_projector(encoder_features[:, 0].to(self.dtype))
        connected = connected.to(embedded.dtype)
        places = self.model.get_placeholder_mask(input_ids, embedded, connected)
        return embedded.masked_scatter(places, connected)


def _check_hidden_states(vision_config: PreTrainedConfig) -> None:
    """LLaVA reads the encoder's list of hidden states: input and every block's output.

    Raises:
        ValueError: If the encoder gives another list (timm's are reshaped to maps).
    """
    with torch.device("meta"), torch.no_grad():
        encoder = AutoModel.from_config(vision_config)
        states = encoder(blank_image(vision_config), output_hidden_states=True).hidden_states
    wanted = sum(image_token_counts(vision_config)), vision_config.hidden_size
    depth = vision_config.num_hidden_layers
    if len(states) != depth + 1 or tuple(states[-1].shape[1:]) != wanted:
        raise ValueError(
            f"method sa is transformers' LLaVA, which reads {depth + 1} hidden states of "
            f"{wanted[0]} tokens; a {type(encoder).__name__} gives {len(states)} of shape "
            f"{tuple(states[-1].shape[1:])}; use method hive or cascaded"
        )
