"""The sa baseline is transformers' LLaVA."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlavaForConditionalGeneration

from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from tests.conftest import VOCABULARY
from tests.models.helpers import (
    PATCHES,
    PREFIX_TOKENS,
    WITH_HIDDEN_STATES,
    add_noise,
    captions,
    images,
)

IMAGE_TOKEN = 3
# OPT and GPT-2 tie their embeddings under a name that LLaVA does not know.
PAIRS = [
    ("clip", "llama"),
    ("siglip", "qwen3"),
    ("dinov2", "gemma3"),
    ("vit", "neox"),
    ("dinov3", "qwen2"),
    ("aimv2", "smollm3"),
    ("vit", "olmo2"),
    ("clip", "phi3"),
]


def make_sa(
    folders: dict[str, Path], vision: str, language: str, **options: Any
) -> SelfAttentionForConditionalGeneration:
    torch.manual_seed(0)
    options = {"image_token_id": IMAGE_TOKEN, **options}
    model = SelfAttentionForConditionalGeneration.from_backbones(
        folders[vision], folders[language], **options
    )
    return model.eval()


def image_tokens(vision: str) -> int:
    """Tokens of an image: CLS alone is dropped, registers stay."""
    prefix = PREFIX_TOKENS[vision]
    return PATCHES + (0 if prefix == 1 else prefix)


def batch(image_token: int = IMAGE_TOKEN, vision: str = "clip") -> dict[str, Tensor]:
    """Start, image, caption of six tokens; the second caption is shorter."""
    placeholders = torch.full((2, image_tokens(vision)), image_token)
    input_ids = torch.cat([torch.ones(2, 1).long(), placeholders, captions(2, 6)], dim=1)
    labels = input_ids.clone()
    labels[:, : 1 + image_tokens(vision)] = -100
    mask = torch.ones_like(input_ids)
    mask[1, -2:], labels[1, -2:] = 0, -100
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": images(2),
    }


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@pytest.mark.parametrize("feature_layer", [-1, -2])
@torch.no_grad()
def test_saved_it_is_a_stock_llava_with_equal_logits_and_loss(
    vision: str,
    language: str,
    feature_layer: int,
    backbone_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    model = make_sa(backbone_folders, vision, language, feature_layer=feature_layer)
    add_noise(model, 0.02)
    model.save_pretrained(tmp_path)
    stock, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(stock) is LlavaForConditionalGeneration
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tied = stock.lm_head.weight is stock.get_input_embeddings().weight
    assert tied == (language in ("llama", "gemma3", "smollm3"))
    inputs = batch(vision=vision)
    expected, found = stock.eval()(**inputs), model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(
        model(**inputs, num_items_in_batch=20).loss,
        stock(**inputs, num_items_in_batch=20).loss,
    )
    again = SelfAttentionForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, expected.logits)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@torch.no_grad()
def test_backbones_are_used_as_they_came(
    vision: str, language: str, backbone_folders: dict[str, Path]
) -> None:
    model = make_sa(backbone_folders, vision, language)
    encoder = AutoModel.from_pretrained(backbone_folders[vision])
    decoder = AutoModelForCausalLM.from_pretrained(backbone_folders[language])
    for ours, theirs in (
        (model.model.vision_tower, encoder),
        (model.model.language_model, decoder.base_model),
        (model.lm_head, decoder.get_output_embeddings()),
    ):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    configs = (model.model.vision_tower.config, model.model.language_model.config)
    assert {config._attn_implementation for config in configs} == {"sdpa"}


@pytest.mark.parametrize("vision", WITH_HIDDEN_STATES)
@pytest.mark.parametrize("feature_layer", [-1, -2])
@torch.no_grad()
def test_cls_is_dropped_and_everything_else_kept(
    vision: str, feature_layer: int, backbone_folders: dict[str, Path]
) -> None:
    model = make_sa(backbone_folders, vision, "llama", feature_layer=feature_layer)
    encoder = AutoModel.from_pretrained(backbone_folders[vision]).eval()
    states = encoder(images(2), output_hidden_states=True).hidden_states
    features = states[8 if feature_layer == -1 else 7]
    if PREFIX_TOKENS[vision] == 1:
        features = features[:, 1:]
    expected = model.model.multi_modal_projector(features)
    found = model(**batch(vision=vision)).image_hidden_states
    assert model.config.image_seq_length == image_tokens(vision)
    assert expected.shape == (2, image_tokens(vision), 48)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@torch.no_grad()
def test_registers_are_kept(backbone_folders: dict[str, Path]) -> None:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_register_tokens=4,
    )
    model = SelfAttentionForConditionalGeneration.from_backbones(
        config, backbone_folders["llama"], IMAGE_TOKEN
    )
    assert model.config.image_seq_length == PATCHES + 5
    features = model.model.get_image_features(images(1), return_dict=True).pooler_output
    assert torch.cat(list(features)).shape[-2] == PATCHES + 5


@torch.no_grad()
def test_image_matters_and_logits_are_optional(backbone_folders: dict[str, Path]) -> None:
    model, inputs = make_sa(backbone_folders, "clip", "llama"), batch()
    output = model(**inputs)
    other = model(**{**inputs, "pixel_values": images(2, seed=1)})
    assert not torch.allclose(output.logits, other.logits)
    silent = model(**inputs, return_logits=False)
    assert silent.logits is None
    assert torch.equal(silent.loss, output.loss)
    last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(last, output.logits[:, -1:])


def test_generation_is_that_of_stock_llava(
    backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = make_sa(backbone_folders, "clip", "llama")
    add_noise(model, 0.1)
    model.save_pretrained(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = {k: v[:1] for k, v in batch().items() if k != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    written = model.generate(**inputs, **options)
    assert written.shape == (1, 1 + PATCHES + 6 + 5)
    assert torch.equal(written, stock.generate(**inputs, **options))
    assert torch.equal(written, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("language", ["llama", "qwen3"])
@torch.no_grad()
def test_a_row_is_added_for_a_new_image_token(
    language: str, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = make_sa(backbone_folders, "clip", language, image_token_id=VOCABULARY)
    plain = AutoModelForCausalLM.from_pretrained(backbone_folders[language])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape == head.shape == (VOCABULARY + 1, 48)
    assert torch.equal(embedding[:VOCABULARY], plain.get_input_embeddings().weight)
    assert torch.equal(head[:VOCABULARY], plain.get_output_embeddings().weight)
    assert model.config.text_config.vocab_size == VOCABULARY + 1
    expected = model(**batch(VOCABULARY)).logits
    assert expected.shape[-1] == VOCABULARY + 1
    model.save_pretrained(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(**batch(VOCABULARY)).logits, expected)


def test_no_row_is_added_where_there_is_one(backbone_folders: dict[str, Path]) -> None:
    model = make_sa(backbone_folders, "clip", "llama", image_token_id=VOCABULARY - 1)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY


@pytest.mark.parametrize(("language", "name"), [("opt", "OPTFor"), ("gpt2", "GPT2LMHead")])
def test_embeddings_tied_elsewhere_are_refused(
    language: str, name: str, backbone_folders: dict[str, Path]
) -> None:
    message = f"LLaVA, which cannot tie the embeddings of a {name}.*; use another language"
    with pytest.raises(ValueError, match=message):
        make_sa(backbone_folders, "clip", language)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ("naflex", "reads images of any shape .* use hive or cascaded"),
        ("timm", "reads 9 hidden states of 17 tokens; a TimmWrapperModel gives 8 .* use method"),
    ],
)
def test_encoders_that_llava_cannot_read_are_refused(
    vision: str, message: str, backbone_folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_sa(backbone_folders, vision, "llama")
    assert "\n" not in str(caught.value)


def test_gradients_reach_every_part(backbone_folders: dict[str, Path]) -> None:
    model = make_sa(backbone_folders, "siglip", "llama")
    model(**batch(), return_logits=False).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    tails = ("model.vision_tower.head.", "model.vision_tower.post_layernorm.")
    assert without
    assert all(name.startswith(tails) for name in without)
