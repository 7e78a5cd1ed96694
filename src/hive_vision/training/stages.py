"""Which parameters a stage trains, and the proof that it did (paper section 4.1, Table 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from hive_vision.models.backbones import (
    backbones_of,
    blocks_of,
    spare_unread,
    unreached_parameters,
)
from hive_vision.models.cross_attention import CrossAttention
from hive_vision.naming import unknown_name

Rules = Mapping[str, float | Literal["frozen"]]

GROUPS = ("vision_model", "vision_tail", "projectors", "cross_attentions", "language_model")

# Where each group lives: in our models, and in transformers' LLaVA.
_PREFIXES = {
    "vision_model.": "vision_model",
    "model.vision_tower.": "vision_model",
    "projectors.": "projectors",
    "model.multi_modal_projector.": "projectors",
    "cross_attentions.": "cross_attentions",
    "language_model.": "language_model",
    "model.language_model.": "language_model",
    "lm_head.": "language_model",
}


@dataclass(frozen=True)
class TrainedPart:
    """The parameters to which one rule applies.

    Attributes:
        rule: Group name or pattern.
        learning_rate: Peak learning rate, ``None`` if frozen.
        names: Of its parameters. Names, not the parameters: sharding replaces those.
        size: Number of scalars.
    """

    rule: str
    learning_rate: float | None
    names: tuple[str, ...]
    size: int


def parameter_groups(model: PreTrainedModel) -> dict[str, str]:
    """Give the group of every parameter: the one partition for freezing, rates and logs.

    ``vision_tail`` are the encoder parameters that this model's loss cannot reach (post-norm,
    pooling head, blocks after the last one used).

    Args:
        model: A `HiveForConditionalGeneration` or a LLaVA model.

    Returns:
        ``parameter name -> group``.
    """
    tail = _vision_tail(model)
    groups = {}
    for name, _ in model.named_parameters():
        group = next((g for prefix, g in _PREFIXES.items() if name.startswith(prefix)), None)
        assert group is not None, name
        groups[name] = "vision_tail" if name in tail else group
    return groups


def sharded_classes(model: PreTrainedModel) -> list[str]:
    """Name the modules that are gathered as a whole when a model is sharded."""
    return sorted({type(block).__name__ for block in blocks_of(model)})


def _vision_prefix(model: PreTrainedModel) -> str:
    return "model.vision_tower." if model.config.model_type == "llava" else "vision_model."


def _vision_tail(model: PreTrainedModel) -> set[str]:
    config, prefix = model.config, _vision_prefix(model)
    if config.model_type == "llava":
        deepest = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
    else:
        deepest = max(config.encoder_layers)
    return {prefix + name for name in unreached_parameters(config.vision_config, deepest)}


def spare_vision_tail(model: PreTrainedModel, groups: Mapping[str, str]) -> None:
    """Let post-norm and pooling head of the encoder work on one token, as nobody reads them.

    Args:
        model: A model that is only trained from now on, see ``spare_unread``.
        groups: What ``parameter_groups`` gave.
    """
    prefix = _vision_prefix(model)
    tail = (name for name, group in groups.items() if group == "vision_tail")
    spare_unread(backbones_of(model)[0], {name.removeprefix(prefix) for name in tail})


def apply_rules(
    model: PreTrainedModel, rules: Rules, groups: Mapping[str, str] | None = None
) -> list[TrainedPart]:
    """Freeze and unfreeze a model's parameters; nothing of an earlier stage remains.

    Args:
        model: The model.
        rules: Group name or shell pattern over parameter names -> peak learning rate or
            ``frozen``. The first rule that fits holds. A rule for a group that this model does
            not have is no error; ``vision_tail`` needs no rule, it is always frozen.
        groups: What ``parameter_groups`` gave, where it was asked before.

    Returns:
        One part for each rule that applies to something.

    Raises:
        ValueError: If a parameter has no rule, a pattern fits nothing, or ``vision_tail`` is to
            be trained.
    """
    groups = parameter_groups(model) if groups is None else groups
    rules = dict(rules)
    if rules.setdefault("vision_tail", "frozen") != "frozen":
        raise ValueError(
            "vision_tail cannot be trained: no gradient reaches it; leave it out or say frozen"
        )
    chosen: dict[str, dict[str, nn.Parameter]] = {rule: {} for rule in rules}
    for name, parameter in model.named_parameters():
        for rule in rules:
            if rule == groups[name] or fnmatchcase(name, rule):
                chosen[rule][name] = parameter
                break
        else:
            raise ValueError(
                f"no rule covers parameter {name!r} of group {groups[name]}; add "
                f"'{groups[name]}: frozen' or a learning rate to the stage's rules"
            )
    for rule, parameters in chosen.items():
        if not parameters and rule not in GROUPS:
            raise ValueError(unknown_name("parameter group or pattern", rule, GROUPS))
    parts = []
    for rule, parameters in chosen.items():
        rate = None if rules[rule] == "frozen" else float(rules[rule])
        for parameter in parameters.values():
            parameter.requires_grad_(rate is not None)
        if parameters:
            size = sum(parameter.numel() for parameter in parameters.values())
            parts.append(TrainedPart(rule, rate, tuple(parameters), size))
    return parts


def check_gradient_path(model: PreTrainedModel) -> None:
    """Refuse to freeze cross-attentions that do not pass any gradient yet.

    Args:
        model: A model after ``apply_rules``.

    Raises:
        ValueError: If every cross-attention is still an exact identity and frozen.
    """
    blocks = [module for module in model.modules() if isinstance(module, CrossAttention)]
    trains = any(p.requires_grad for block in blocks for p in block.parameters())
    if blocks and not trains and all(block.is_identity() for block in blocks):
        raise ValueError(
            "every cross-attention still has a zero output or gate and this stage freezes them, "
            "so the projectors would get no gradient; give cross_attentions a learning rate in "
            "the rules of the first stage"
        )


def describe_parts(parts: list[TrainedPart]) -> str:
    """Write the table of what trains, one line for each rule."""
    width = max(len(part.rule) for part in parts)
    lines = []
    for part in parts:
        rate = "frozen" if part.learning_rate is None else f"{part.learning_rate:g}"
        count = len(part.names)
        lines.append(
            f"{part.rule:<{width}}  {part.size:>13,} parameters  {count:>4} tensors  {rate}"
        )
    return "\n".join(lines)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Collect a model's weights on the CPU, also where each process holds a part of them.

    All processes call it; the main one gets the weights, the others may get none.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def prove_update(
    parts: list[TrainedPart], before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Prove that each trained part moved and each frozen one is bit-identical.

    Args:
        parts: What ``apply_rules`` gave.
        before: ``hash_tensors`` from before the stage.
        after: The same from after it.

    Returns:
        For each rule the number of tensors that moved and of those that did not.

    Raises:
        RuntimeError: If a trained part did not move or a frozen one did.
    """
    proof = {}
    for part in parts:
        moved = [name for name in part.names if before[name] != after[name]]
        proof[part.rule] = {"moved": len(moved), "unchanged": len(part.names) - len(moved)}
        if part.learning_rate is None and moved:
            raise RuntimeError(f"{part.rule} is frozen, but {moved[0]!r} changed")
        if part.learning_rate and not moved:
            raise RuntimeError(
                f"{part.rule} should have trained, but none of its tensors changed "
                "(cross-attentions start as an identity: projectors have no gradient before the "
                "second step)"
            )
    return proof
