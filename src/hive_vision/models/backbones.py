"""Loading encoders and language models, and finding their layers by structure.

Nothing here knows a model by its name: blocks are the one stack of equal modules, so any
Hugging Face encoder or causal language model built as such a stack works. Two containers are
not transformers' own and are opened here: timm's models and MobileLLM's format.

Shapes: B images, N tokens of one image, D encoder width.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from hive_vision.models import mobilellm
from hive_vision.models.cross_attention import CrossAttention

_INPUTS = {"vision": "pixel_values", "language": "input_ids"}

Source: TypeAlias = str | Path | PreTrainedConfig


def load_config(source: Source, role: str) -> PreTrainedConfig:
    """Read a backbone's configuration; of a dual encoder (CLIP, SigLIP) the vision half.

    A timm encoder's gets the sizes that every other encoder's has; MobileLLM's becomes Llama's.

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
            written, _ = PreTrainedConfig.get_config_dict(source)
            if written.get("model_type") == mobilellm.MODEL_TYPE:
                return mobilellm.llama_config(written, source)
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{role} backbone {str(source)!r} is neither a model folder nor a reachable hub "
                f"id: {reason}"
            ) from error
    if role == "vision" and "vision_config" in config.sub_configs:
        return config.vision_config
    return _with_sizes(config) if isinstance(config, TimmWrapperConfig) else config


def load_vision_model(source: Source, *, needs_pooler: bool = True) -> PreTrainedModel:
    """Load (or, from a configuration, make at random) the plain vision encoder in float32.

    Args:
        source: Hub id, local folder or configuration.
        needs_pooler: Whether a checkpoint without pooler weights (as classifiers come) is refused;
            else the encoder is loaded without a pooler.

    Raises:
        ValueError: If weights that the encoder needs are missing from the checkpoint, or if it
            is not one stack of equal token grids.
    """
    model = _load(AutoModel, source, "vision", needs_pooler)
    image_token_counts(model.config)
    return model


def load_language_model(source: Source) -> PreTrainedModel:
    """Load (or, from a configuration, make at random) the causal language model in float32.

    Raises:
        ValueError: If weights that the model needs are missing from the checkpoint.
    """
    return _load(AutoModelForCausalLM, source, "language")


def _load(auto_class: Any, source: Source, role: str, needs_pooler: bool = True) -> PreTrainedModel:
    config = load_config(source, role)
    report: dict[str, Any] = {}
    try:
        if isinstance(source, PreTrainedConfig):
            # A configuration names the precision of the weights that it came with.
            model = auto_class.from_config(config, dtype=torch.float32)
        else:
            model, report = _read(auto_class, source, config)
            inside = any(key.startswith("vision_model.") for key in report["unexpected_keys"])
            if report["missing_keys"] and inside:  # a dual encoder that transformers takes whole
                mapping = {r"^vision_model\.": ""}
                model, report = _read(auto_class, source, config, key_mapping=mapping)
            optional = "add_pooling_layer" in signature(type(model).__init__).parameters
            missing = report["missing_keys"]
            only_pooler = all(key.startswith("pooler.") for key in missing)
            if missing and only_pooler and optional and not needs_pooler:
                model, report = _read(auto_class, source, config, add_pooling_layer=False)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{role} backbone {_name(source)} cannot be loaded: {reason}") from error
    _check_report(report, f"{role} backbone {_name(source)}", type(model).__name__)
    if model.main_input_name != _INPUTS[role]:
        raise ValueError(
            f"{role} backbone {_name(source)} is a {type(model).__name__}, which reads "
            f"{model.main_input_name}; a {role} backbone reads {_INPUTS[role]}"
        )
    return model


def _read(auto_class: Any, source: Source, config: PreTrainedConfig, **options: Any) -> Any:
    return auto_class.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported later like missing ones
        **options,
    )


def _check_report(report: dict[str, Any], backbone: str, wanted: str) -> None:
    """Refuse a checkpoint that lacks weights; what it has beyond them (heads, text) is not read.

    Raises:
        ValueError: Names what was expected and what was found instead.
    """
    shapes = sorted(
        (key, tuple(expected), tuple(found))
        for key, found, expected in report.get("mismatched_keys", ())
    )
    if shapes:
        listed = ", ".join(f"{key}: expected {want}, found {got}" for key, want, got in shapes[:3])
        raise ValueError(
            f"{backbone} has {len(shapes)} weights of another shape than a {wanted} "
            f"({listed}{', ...' if shapes[3:] else ''}); its config.json belongs to other weights"
        )
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        found = sorted(report["unexpected_keys"])
        raise ValueError(
            f"{backbone} lacks {len(missing)} weights of a {wanted}, which would have stayed "
            f"random: expected {_some(missing)}; found beyond the others {_some(found)}"
        )


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (", ..." if names[3:] else "")) or "none"


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


def _with_sizes(config: TimmWrapperConfig) -> TimmWrapperConfig:
    """Copy a timm configuration and add the sizes, which it leaves to the model inside.

    They are ordinary fields of the copy: saved with it, and read by transformers' LLaVA.
    """
    if getattr(config, "num_hidden_layers", None) is not None:
        return config
    if not timm.is_model(config.architecture):
        raise ValueError(
            f"timm {timm.__version__} has no architecture {config.architecture!r}; a newer one may"
        )
    config = deepcopy(config)
    options = config.model_args or {}
    pretrained = getattr(config, "pretrained_cfg", None)
    if pretrained is None:
        pretrained = {
            "input_size": timm.get_pretrained_cfg_value(config.architecture, "input_size")
        }
    config.num_channels, *size = pretrained["input_size"]
    config.image_size = list(pair(options.get("img_size") or size))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        try:
            blocks = find_blocks(model)
        except ValueError as error:
            raise _not_a_stack(config, "it has several stacks of blocks or none") from error
        with torch.no_grad(), capture_block_outputs(blocks, [1]) as outputs:
            model(**blank_images(config))
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    config.patch_size = None if first is None else list(first.stride)
    config.num_hidden_layers = len(blocks)
    config.hidden_size = outputs[1].shape[-1]
    return config


def find_blocks(model: nn.Module, num_layers: int | None = None) -> nn.ModuleList | nn.Sequential:
    """Find the stack of blocks of an encoder or decoder.

    Args:
        model: The backbone.
        num_layers: How many blocks its configuration announces; the longest stack if not given.

    Returns:
        The one outermost container of ``num_layers`` modules of the same class.

    Raises:
        ValueError: If there is no such container or more than one.
    """
    found: list[tuple[str, nn.ModuleList | nn.Sequential]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        if num_layers is not None and len(module) != num_layers:
            continue
        nested = any(name.startswith(outer + ".") for outer, _ in found)
        same_class = len({type(child) for child in module}) == 1
        if same_class and not nested:
            found.append((name, module))
    longest = max((len(module) for _, module in found), default=0)
    found = [(name, module) for name, module in found if len(module) == longest]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} should have exactly one stack of {num_layers or longest} "
            f"equal blocks; found: {names}. Only plain transformer stacks are supported"
        )
    return found[0][1]


def backbones_of(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Give encoder and language model of a `HiveForConditionalGeneration` or a LLaVA model."""
    if model.config.model_type == "llava":
        return model.model.vision_tower, model.model.language_model
    return model.vision_model, model.language_model


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that do nearly all of the work: of both backbones, and between them."""
    vision, language = backbones_of(model)
    return [
        *find_blocks(vision, model.config.vision_config.num_hidden_layers),
        *find_blocks(language, model.config.text_config.num_hidden_layers),
        *(module for module in model.modules() if isinstance(module, CrossAttention)),
    ]


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
    """Count an encoder's tokens without running it on data, and see that they stay the same.

    Args:
        config: Vision configuration.

    Returns:
        Tokens in the patch grid, and prefix tokens (CLS, registers) before it.

    Raises:
        ValueError: If the blocks do not all give the same grid of tokens.
    """
    for needed in ("num_hidden_layers", "hidden_size", "patch_size"):
        if getattr(config, needed, None) is None:
            raise _not_a_stack(config, f"it has no {needed}")
    depth = config.num_hidden_layers
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        blocks = find_blocks(model, depth)
        try:
            with torch.no_grad(), capture_block_outputs(blocks, range(1, depth + 1)) as outputs:
                model(**blank_images(config))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise _not_a_stack(config, f"a blank image fails: {reason}") from error
    shapes = {tuple(features.shape) for features in outputs.values()}
    tokens = min(shape[1] for shape in shapes)
    if has_any_size(config):
        patches = config.num_patches
    else:
        height, width = pair(config.image_size)
        patch_height, patch_width = pair(config.patch_size)
        patches = (height // patch_height) * (width // patch_width)
    if shapes != {(1, tokens, config.hidden_size)} or tokens < patches:
        listed = ", ".join(sorted(str(shape[1:]) for shape in shapes))
        raise _not_a_stack(config, f"its {depth} parts give {listed} for {patches} patches")
    return patches, tokens - patches


def _not_a_stack(config: PreTrainedConfig, reason: str) -> ValueError:
    name = getattr(config, "architecture", config.model_type)
    return ValueError(
        f"encoder {name!r} is not one stack of equal token grids ({reason}); only plain vision "
        "transformers can be used, not hierarchical or convolutional encoders"
    )


def hash_tensors(
    tensors: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, str]:
    """Give a SHA-256 of the bytes of each named tensor, to know later whether it is the same.

    Args:
        tensors: A model's parameters or state.
        names: Which of them; all if null.
    """
    chosen = tensors if names is None else names
    return {name: hashlib.sha256(_bytes(tensors[name])).hexdigest() for name in chosen}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


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
        model = _eager(config)
        blocks = find_blocks(model, config.num_hidden_layers)
        with capture_block_outputs(blocks, [deepest_layer]) as outputs:
            model(**blank_images(config))
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(outputs[deepest_layer].sum(), parameters, allow_unused=True)
    return {name for name, grad in zip(names, gradients, strict=True) if grad is None}


def _eager(config: PreTrainedConfig) -> PreTrainedModel:
    """Make an encoder for the meta device, which fused attention does not always know."""
    # Of a copy, whose attention may change.
    return AutoModel.from_config(deepcopy(config), attn_implementation="eager")


def spare_unread(encoder: PreTrainedModel, unread: Collection[str]) -> None:
    """Let an encoder's modules that nobody reads work on one token: post-norm, pooling head.

    A pooling head over all tokens is cheap in operations, but in bfloat16 on a CPU PyTorch copies
    its weights once for every token. Only direct children of the encoder are spared, and none
    where they cannot do with one token (tried on the meta device) or where images are padded, as
    a head reads the mask too. The encoder's own outputs mean nothing afterwards, those of its
    blocks stay the same.

    Args:
        encoder: Whose blocks' outputs are read from now on.
        unread: What ``unreached_parameters`` gave, or more.
    """
    if has_any_size(encoder.config):
        return
    names = []
    for name, child in encoder.named_children():
        parameters = {f"{name}.{part}" for part, _ in child.named_parameters()}
        if parameters and parameters <= set(unread):
            names.append(name)
    with torch.device("meta"), torch.no_grad():
        trial = _eager(encoder.config)
        for name in names:
            trial.get_submodule(name).register_forward_pre_hook(_first_token)
        try:
            trial(**blank_images(encoder.config))
        except (RuntimeError, ValueError, IndexError):
            return
    for name in names:
        encoder.get_submodule(name).register_forward_pre_hook(_first_token)


def _first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a[:, :1] if isinstance(a, Tensor) and a.ndim == 3 else a for a in args)


def has_any_size(config: PreTrainedConfig) -> bool:
    """Whether an encoder reads images of any shape, cut into patches by its image processor.

    Those (SigLIP 2 NaFlex) have a number of patches instead of an image size.
    """
    return getattr(config, "image_size", None) is None


def blank_image(config: PreTrainedConfig) -> Tensor:
    """Make one black image (1, C, H, W) of the size that the encoder expects.

    Raises:
        ValueError: If there is no such size.
    """
    if has_any_size(config):
        raise ValueError(
            f"a {config.model_type} encoder reads images of any shape and gives each another "
            "number of tokens, which method sa (transformers' LLaVA) cannot; use hive or cascaded"
        )
    return torch.zeros(1, config.num_channels, *pair(config.image_size))


def blank_images(config: PreTrainedConfig) -> dict[str, Any]:
    """Make what the encoder is called with for one black image, on the current device."""
    if not has_any_size(config):
        return {"pixel_values": blank_image(config)}
    side = int(config.num_patches**0.5)
    pixels = torch.zeros(1, side * side, config.num_channels * config.patch_size**2)
    return {
        "pixel_values": pixels,
        # Read as numbers by the encoder, so never on the meta device; nothing is padded.
        "spatial_shapes": torch.tensor([[side, side]], device="cpu"),
        "pixel_attention_mask": None,
    }


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Give height and width of what may be square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
