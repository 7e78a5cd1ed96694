"""The published sizes of the paper's backbones, as their config.json files have them."""

import json
from pathlib import Path
from typing import Any

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
SMALL_LLAMA = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip",
        "text_config": {"model_type": "clip_text_model"},
        "vision_config": {
            **LARGE,
            "model_type": "clip_vision_model",
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "google/siglip-large-patch16-384": {
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model"},
        "vision_config": {
            **LARGE,
            "model_type": "siglip_vision_model",
            "image_size": 384,
            "patch_size": 16,
        },
    },
    "facebook/MobileLLM-350M": {
        **SMALL_LLAMA,
        "model_type": "mobilellm",
        "architectures": ["MobileLLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
            "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
        },
        "head_dim": 64,
        "layer_sharing": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "share_embedding": True,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "HuggingFaceTB/SmolLM2-360M": {
        **SMALL_LLAMA,
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}


def write_configs(folder: Path) -> dict[str, Path]:
    """Write a config.json for each backbone; hub id -> folder."""
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = folder / name
        folders[name].mkdir(parents=True)
        (folders[name] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folders
