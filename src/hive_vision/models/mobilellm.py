"""MobileLLM's published format, read as what it is: a Llama with tied embeddings.

The checkpoints name a class that only exists as code beside their weights, say
``share_embedding: true`` next to ``tie_word_embeddings: false``, and have no ``lm_head``. Their
block is Llama's, so they need none of that code, and whatever is saved later is a stock Llama.
"""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

MODEL_TYPE = "mobilellm"
_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "vocab_size",
)


def llama_config(published: Mapping[str, Any], source: object) -> LlamaConfig:
    """Turn a MobileLLM ``config.json`` into Llama's configuration.

    Args:
        published: What the file says.
        source: Where it lies, for the error.

    Raises:
        ValueError: If layers share their weights (MobileLLM-LS), which no Llama does.
    """
    if published.get("layer_sharing"):
        raise ValueError(
            f"language backbone {str(source)!r} shares the weights of neighbouring layers "
            "(layer_sharing: true), which is no Llama; use the MobileLLM without LS in its name"
        )
    tied = bool(published.get("share_embedding")) or bool(published.get("tie_word_embeddings"))
    fields = {name: published[name] for name in _FIELDS if published.get(name) is not None}
    return LlamaConfig(**fields, tie_word_embeddings=tied)
