"""Tiny whole dual encoders in the file formats in which their authors publish them."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModel, PreTrainedModel

from tests.conftest import IMAGE_SIZE, PATCH_SIZE, WORDS, vision_config
from tests.models.helpers import add_noise

FAMILIES = ("clip", "siglip", "siglip2")
VISION = {"clip": "clip", "siglip": "siglip", "siglip2": "naflex"}  # families of tests.conftest
MAX_TOKENS = 24
LAYERS = 4


def write_dual_encoder(
    family: str, folder: Path, seed: int = 0, **vision_fields: Any
) -> PreTrainedModel:
    """Write model, tokenizer and image processor; weights are random, and no text like another."""
    folder.mkdir(parents=True)
    vision = vision_config(VISION[family], LAYERS).to_dict() | vision_fields
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": MAX_TOKENS,
    }
    config: transformers.PreTrainedConfig
    if family == "clip":
        text |= _clip_tokenizer(folder)
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size
        ).save_pretrained(folder)
    elif family == "siglip":
        text |= {**_siglip_tokenizer(folder), "projection_size": 32}
        config = transformers.SiglipConfig(vision_config=vision, text_config=text)
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        transformers.SiglipImageProcessor(size=size).save_pretrained(folder)
    else:
        text |= {**_siglip2_tokenizer(folder), "projection_size": 32}
        config = transformers.Siglip2Config(vision_config=vision, text_config=text)
        transformers.Siglip2ImageProcessor(
            patch_size=PATCH_SIZE, max_num_patches=20
        ).save_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModel.from_config(config).eval()
    add_noise(model, 0.1, seed)
    model.save_pretrained(folder)
    return model


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _clip_tokenizer(folder: Path) -> dict[str, int]:
    """Byte pairs without merges, as vocab.json and merges.txt; the end token pads."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), start, end]
    _write_json(folder / "vocab.json", {token: row for row, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, **special},
    )
    last = len(tokens) - 1
    return {
        "vocab_size": len(tokens),
        "bos_token_id": last - 1,
        "eos_token_id": last,
        "pad_token_id": last,
    }


def _siglip_tokenizer(folder: Path) -> dict[str, int]:
    """A sentencepiece model; no attention mask."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of the " + " ".join(WORDS)] * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "SiglipTokenizer",
            "model_max_length": MAX_TOKENS,
            "model_input_names": ["input_ids"],
            "do_lower_case": True,
            "eos_token": "</s>",
            "pad_token": "</s>",
            "unk_token": "<unk>",
        },
    )
    return {"vocab_size": 70, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}


def _siglip2_tokenizer(folder: Path) -> dict[str, int]:
    """Gemma's kind, which does not say how long a text may be; no attention mask."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, "▁", *(chr(code) for code in range(33, 127))]
    transformers.Siglip2Tokenizer(
        vocab={token: row for row, token in enumerate(tokens)},
        merges=[],
        padding_side="right",
        model_input_names=["input_ids"],
    ).save_pretrained(folder)
    return {
        "vocab_size": len(tokens),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
