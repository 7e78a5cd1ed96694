"""MobileLLM's published format, written here as its authors write it, is read as a Llama."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hive_vision.models import processing
from hive_vision.models.backbones import load_config, load_language_model
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.mobilellm import llama_config
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from tests.conftest import WORDS
from tests.models.helpers import captions, images

# The 350M model's config.json.
PUBLISHED: dict[str, Any] = {
    "architectures": ["MobileLLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 960,
    "initializer_range": 0.02,
    "intermediate_size": 2560,
    "layer_sharing": False,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "mobilellm",
    "num_attention_heads": 15,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "share_embedding": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
VOCABULARY = 300
SMALL = {
    **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY},
}


def write(folder: Path, weights: str = "pytorch_model.bin", **fields: Any) -> LlamaForCausalLM:
    """Write config and weights (half precision, no lm_head) and return the same as a Llama."""
    config = {**PUBLISHED, **SMALL, **fields}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    tied = config["share_embedding"]
    plain = LlamaForCausalLM(
        LlamaConfig(**SMALL, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=tied)
    ).eval()
    for parameter in plain.parameters():
        parameter.data = parameter.half().float()  # as it will be read back
    state = {
        k: v.half() for k, v in plain.state_dict().items() if not tied or k != "lm_head.weight"
    }
    if weights == "pytorch_model.bin":
        torch.save(state, folder / weights)
    else:
        save_file(state, folder / weights, metadata={"format": "pt"})
    return plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and a tokenizer that is only a sentencepiece model."""
    folder = tmp_path_factory.mktemp("mobilellm")
    write(folder)
    texts = folder / "texts"
    texts.write_text("\n".join(f"{a} {b}" for a in WORDS for b in WORDS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_published_sizes_are_the_published_number_of_parameters() -> None:
    config = llama_config(PUBLISHED, "MobileLLM-350M")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == 345_355_200
    assert config.rope_parameters["rope_theta"] == 10_000.0
    assert (config.head_dim, config.max_position_embeddings) == (64, 2048)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_loads_as_the_llama_that_it_is(weights: str, shared: bool, tmp_path: Path) -> None:
    plain = write(tmp_path, weights, share_embedding=shared)
    model = load_language_model(tmp_path).eval()
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == shared
    assert torch.equal(model(captions(2, 6)).logits, plain(captions(2, 6)).logits)
    assert load_config(tmp_path, "language").model_type == "llama"


@torch.no_grad()
def test_what_is_saved_is_a_stock_llama(folder: Path, tmp_path: Path) -> None:
    expected = write(folder)(captions(2, 6)).logits
    model = load_language_model(folder).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", True)
    assert not {"auto_map", "share_embedding"} & config.keys()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(captions(2, 6)).logits, expected)


@torch.no_grad()
def test_inside_both_methods(
    folder: Path, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    hive = HiveForConditionalGeneration.from_backbones(backbone_folders["siglip"], folder).eval()
    expected = write(folder)(captions(2, 6)).logits
    assert torch.equal(hive(captions(2, 6), images(2)).logits, expected)
    hive.save_pretrained(tmp_path / "hive")
    loaded = HiveForConditionalGeneration.from_pretrained(tmp_path / "hive").eval()
    assert torch.equal(loaded(captions(2, 6), images(2)).logits, expected)

    sa = SelfAttentionForConditionalGeneration.from_backbones(
        backbone_folders["siglip"], folder, image_token_id=VOCABULARY
    ).eval()
    sa.save_pretrained(tmp_path / "sa")
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "sa").eval()
    inputs = torch.cat([torch.full((2, 16), VOCABULARY), captions(2, 6)], dim=1)
    assert stock.config.text_config.model_type == "llama"
    assert stock.lm_head.weight is stock.get_input_embeddings().weight
    assert torch.equal(
        stock(input_ids=inputs, pixel_values=images(2)).logits,
        sa(input_ids=inputs, pixel_values=images(2)).logits,
    )


def test_tokenizer_is_the_sentencepiece_model(
    folder: Path, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    processor = HiveProcessor.from_backbones(backbone_folders["siglip"], folder)
    texts = ["a small red circle", "blue and  green", "a ünknown wörd", "left "]
    for text, ids in zip(texts, processor.encode_captions(texts), strict=True):
        assert ids == [1, *model.encode(text), 2]
    processor.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file(), "what is saved needs no sentencepiece"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts)["input_ids"] == processor.tokenizer(texts)["input_ids"]


def test_what_reads_the_tokenizer_is_named_where_it_is_missing(
    folder: Path, backbone_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "tokenizer.model").write_bytes(b"nothing that can be read")
    monkeypatch.setattr(processing, "is_sentencepiece_available", lambda: False)
    message = r"has no tokenizer: .* pip install sentencepiece protobuf \("
    with pytest.raises(ValueError, match=message) as caught:
        HiveProcessor.from_backbones(backbone_folders["siglip"], broken)
    assert "\n" not in str(caught.value)


def test_shared_layers_are_refused(tmp_path: Path) -> None:
    write(tmp_path, layer_sharing=True)
    with pytest.raises(ValueError, match=r"shares the weights of neighbouring .* without LS"):
        load_language_model(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", share_embedding=True)
    config = {**PUBLISHED, **SMALL, "share_embedding": False}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks 1 weights .* expected lm_head\.weight"):
        load_language_model(tmp_path)
