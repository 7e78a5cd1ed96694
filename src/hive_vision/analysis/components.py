"""Which part of a model an operation belongs to, in the forward and in the backward pass."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from hive_vision.models.cross_attention import CrossAttention
from hive_vision.models.hive import HiveForConditionalGeneration

OTHER = "other"
VISION = "vision"
PROJECTORS = "projectors"
KEYS_AND_VALUES = "keys and values"
CROSS_ATTENTION = "cross-attention"
LANGUAGE = "language model"
HEAD = "head"
COMPONENTS = (VISION, PROJECTORS, KEYS_AND_VALUES, CROSS_ATTENTION, LANGUAGE, HEAD)


class Place(NamedTuple):
    """Where an operation happens.

    Attributes:
        component: One of ``COMPONENTS``, or ``OTHER``.
        backward: In the backward pass, recomputation included.
    """

    component: str
    backward: bool


def components_of(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The modules of each component; one inside of another belongs to the inner one.

    Args:
        model: Of method hive, cascaded or sa.

    Raises:
        ValueError: If it is another model.
    """
    head = [model.get_output_embeddings()]
    if isinstance(model, LlavaForConditionalGeneration):
        return {
            VISION: [model.model.vision_tower],
            PROJECTORS: [model.model.multi_modal_projector],
            LANGUAGE: [model.model.language_model],
            HEAD: head,
        }
    if not isinstance(model, HiveForConditionalGeneration):
        raise ValueError(
            f"a {type(model).__name__} has no components to count; give hive, cascaded or sa"
        )
    blocks = [block for block in model.cross_attentions if isinstance(block, CrossAttention)]
    return {
        VISION: [model.vision_model],
        PROJECTORS: list(model.projectors),
        KEYS_AND_VALUES: [linear for b in blocks for linear in (b.k_proj, b.v_proj)],
        CROSS_ATTENTION: list(blocks),
        LANGUAGE: [model.language_model.base_model],
        HEAD: head,
    }


class ComponentTracker:
    """Knows at any moment of a step which component is at work.

    In the forward pass that is the innermost module called. What it made is marked in the
    autograd graph, and the mark is read when the backward pass comes there, so freezing,
    checkpointing and any order of execution are right. (torch's ``ModuleTracker`` loses its way
    in modules whose input needs no gradient, as a frozen encoder's projectors.)

    Args:
        components: Name -> modules.
    """

    def __init__(self, components: Mapping[str, Sequence[nn.Module]]) -> None:
        self._components = components
        self._stack = [OTHER]
        self._backward_in = OTHER
        self._marked: set[Node] = set()
        self._handles: list[RemovableHandle] = []

    @property
    def place(self) -> Place:
        """Where the operation that runs now belongs."""
        if not _in_backward():
            return Place(self._stack[-1], backward=False)
        recomputes = len(self._stack) > 1
        return Place(self._stack[-1] if recomputes else self._backward_in, backward=True)

    def __enter__(self) -> Self:
        for name, modules in self._components.items():
            for module in modules:
                self._handles += [
                    module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                    module.register_forward_hook(self._leaving, always_call=True),
                ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._marked.clear()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._mark((args, kwargs))  # by whom it was made, before the inner one begins
            self._stack.append(name)

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._mark(output)
        self._stack.pop()

    def _mark(self, values: Any) -> None:
        if _in_backward():
            return  # what is recomputed there is not differentiated itself
        component = self._stack[-1]

        def begin(_: Any) -> None:
            self._backward_in = component

        waiting = list(_nodes(values))
        while waiting:
            node = waiting.pop()
            if node in self._marked:
                continue
            self._marked.add(node)
            node.register_prehook(begin)
            waiting += [before for before, _ in node.next_functions if before is not None]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _nodes(values: Any) -> Iterator[Node]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            yield value.grad_fn
