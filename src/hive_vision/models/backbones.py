"""Loading encoders and language models, and finding their layers by structure.

Nothing here knows a model by its name: blocks are the one stack of equal modules, so any
Hugging Face encoder or causal language model built as such a stack works.

Shapes: B images, N tokens of one image, D encoder width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

_INPUTS = {"vision": "pixel_values", "language": "input_ids"}

Source: TypeAlias = str | Path | PreTrainedConfig


def load_config(source: Source, role: str) -> PreTrainedConfig:
    """Read a backbone's configuration; of a dual encoder (CLIP, SigLIP) the vision half.

    Args:
        source: Hub id, local folder, or a configuration.
        role: ``vision`` or ``language``, also the word used in error messages.

    Raises:
        ValueError: If nothing can be loaded from ``source``.
    """
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise ValueError(
                f"{role} backbone {str(source)!r} has no config.json; give a Hugging Face model "
                "folder (as save_pretrained writes it) or a hub id"
            )
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{role} backbone {str(source)!r} is neither a model folder nor a reachable hub "
                f"id: {reason}"
            ) from error
    if role == "vision" and "vision_config" in config.sub_configs:
        return config.vision_config
    return config


def load_vision_model(source: Source) -> PreTrainedModel:
    """Load (or, from a configuration, make at random) the plain vision encoder in float32.

    Raises:
        ValueError: If weights that the encoder needs are missing from the checkpoint.
    """
    return _load(AutoModel, source, "vision")


def load_language_model(source: Source) -> PreTrainedModel:
    """Load (or, from a configuration, make at random) the causal language model in float32.

    Raises:
        ValueError: If weights that the model needs are missing from the checkpoint.
    """
    return _load(AutoModelForCausalLM, source, "language")


def _load(auto_class: Any, source: Source, role: str) -> PreTrainedModel:
    config = load_config(source, role)
    try:
        if isinstance(source, PreTrainedConfig):
            model, missing = auto_class.from_config(config), []
        else:
            model, report = auto_class.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below like missing ones
            )
            mismatched = {key for key, *_ in report["mismatched_keys"]}
            missing = sorted(mismatched.union(report["missing_keys"]))
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{role} backbone {_name(source)} cannot be loaded: {reason}") from error
    if missing:
        raise ValueError(
            f"{role} backbone {_name(source)} lacks {len(missing)} weights of a "
            f"{type(model).__name__}, first {missing[0]!r}; they would have stayed random"
        )
    if model.main_input_name != _INPUTS[role]:
        raise ValueError(
            f"{role} backbone {_name(source)} is a {type(model).__name__}, which reads "
            f"{model.main_input_name}; a {role} backbone reads {_INPUTS[role]}"
        )
    return model


def _name(source: Source) -> str:
    is_config = isinstance(source, PreTrainedConfig)
    return type(source).__name__ if is_config else repr(str(source))


def join_configs(
    config_class: type[PreTrainedConfig],
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    **options: Any,
) -> PreTrainedConfig:
    """Make the configuration of a joint model without changing those of its loaded parts.

    A new parent configuration resets the attention implementation of its sub-configurations.

    Args:
        config_class: `HiveConfig` or `LlavaConfig`.
        vision_config: The encoder's, shared and not copied.
        text_config: The language model's, likewise.
        **options: Further fields.
    """
    parts = (vision_config, text_config)
    attention = [part._attn_implementation for part in parts]
    config = config_class(vision_config=vision_config, text_config=text_config, **options)
    for part, implementation in zip(parts, attention, strict=True):
        part._attn_implementation = implementation
    return config


def find_blocks(model: nn.Module, num_layers: int) -> nn.ModuleList | nn.Sequential:
    """Find the stack of blocks of an encoder or decoder.

    Args:
        model: The backbone.
        num_layers: How many blocks its configuration announces.

    Returns:
        The one outermost container of ``num_layers`` modules of the same class.

    Raises:
        ValueError: If there is no such container or more than one.
    """
    found: list[tuple[str, nn.ModuleList | nn.Sequential]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) != num_layers:
            continue
        nested = any(name.startswith(outer + ".") for outer, _ in found)
        same_class = len({type(child) for child in module}) == 1
        if same_class and not nested:
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} should have exactly one stack of {num_layers} equal blocks; "
            f"found: {names}. Only plain transformer stacks are supported"
        )
    return found[0][1]


@contextmanager
def capture_block_outputs(
    blocks: nn.ModuleList | nn.Sequential, layers: Sequence[int]
) -> Iterator[dict[int, Tensor]]:
    """Collect what leaves chosen blocks while the encoder runs inside the ``with``.

    Args:
        blocks: The stack, see ``find_blocks``.
        layers: 1-based layers l; F_l is the output of block l, before any final norm.

    Yields:
        A dictionary that fills with ``l -> F_l``, each (B, N, D), prefix tokens included.
    """
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def image_token_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """Count an encoder's tokens without running it on data.

    Args:
        config: Vision configuration with ``image_size`` and ``patch_size``.

    Returns:
        Tokens in the patch grid, and prefix tokens (CLS, registers) before it.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        blocks = find_blocks(model, config.num_hidden_layers)
        with torch.no_grad(), capture_block_outputs(blocks, [1]) as outputs:
            model(blank_image(config))
    height, width = _pair(config.image_size)
    patch_height, patch_width = _pair(config.patch_size)
    grid = (height // patch_height) * (width // patch_width)
    return grid, outputs[1].shape[1] - grid


def unreached_parameters(config: PreTrainedConfig, deepest_layer: int) -> set[str]:
    """Name the encoder parameters from which no gradient of F_1 ... F_deepest can come.

    Post-norm, pooling head, mask token, blocks after the deepest used one: found by asking
    autograd on the meta device, so no model family needs to be known.

    Args:
        config: Vision configuration.
        deepest_layer: 1-based layer that is read last.

    Returns:
        Names as in the encoder's ``named_parameters``.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        blocks = find_blocks(model, config.num_hidden_layers)
        with capture_block_outputs(blocks, [deepest_layer]) as outputs:
            model(blank_image(config))
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(outputs[deepest_layer].sum(), parameters, allow_unused=True)
    return {name for name, grad in zip(names, gradients, strict=True) if grad is None}


def blank_image(config: PreTrainedConfig) -> Tensor:
    """Make one black image (1, C, H, W) of the size that the encoder expects."""
    return torch.zeros(1, config.num_channels, *_pair(config.image_size))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
