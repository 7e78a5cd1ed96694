"""What one training step needs, read off the real model on the meta device.

Forward and backward run without weights or data, for any backbone and any freezing. Every
storage that appears is followed until it is freed, every product is counted. The trace is made
with a batch size and text lengths that are primes and divide nothing else in the model, so each
size says by its factors how it grows, and one trace answers for every batch and caption length.

Shapes: B captions, T text tokens, L tokens of the language model (T, or T and the image tokens).
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from hive_vision.analysis.components import ComponentTracker, Place

# Operations that change the values of their first argument and nothing else.
_IN_PLACE = frozenset(("add_", "sub_", "mul_", "div_", "zero_", "fill_", "copy_", "masked_fill_"))

# How a size grows: not at all, with B, B T, B L and B L^2.
_CLASSES = 5

# Prime factors up to this one can be those of any size.
_SMALL = 31


@dataclass(frozen=True)
class Sizes:
    """The sizes of a trace: batch B, text tokens T, and L with the image's placeholders.

    B and T are primes, L has a prime factor; none of those divides a size of the model.
    """

    batch: int
    text: int
    length: int

    def split(self, number: int) -> tuple[int, float]:
        """Give the class of a size, and the size per unit of what it grows with."""
        if number == 0 or number % self.batch:
            return 0, number
        rest = number // self.batch
        if rest % self.length == 0:
            rest //= self.length
            if rest % self.length == 0:
                return 4, rest / self.length
            return (3 if self.length != self.text else 2), rest
        if rest % self.text == 0:
            return 2, rest / self.text
        return 1, rest

    def growth(self, batch: int, text: float) -> NDArray[np.float64]:
        """What each class is multiplied by for another batch size and text length."""
        length = self.length - self.text + text
        return np.array([1, batch, batch * text, batch * length, batch * length**2], np.float64)


@dataclass(frozen=True)
class Trace:
    """One micro-batch, event by event.

    Attributes:
        sizes: The primes.
        live: (events, classes) bytes alive besides weights, gradients and optimiser states.
        new_gradients: (events,) bytes of gradients added up so far.
        saved: (classes,) bytes alive when the loss is known: what backward needs.
        flops: Place in the step -> (classes,).
    """

    sizes: Sizes
    live: NDArray[np.float64]
    new_gradients: NDArray[np.float64]
    saved: NDArray[np.float64]
    flops: Mapping[Place, NDArray[np.float64]]

    def peak(self, batch: int, text: float, accumulates: bool) -> tuple[float, float]:
        """Bytes at the fullest moment, and the gradients among them.

        Args:
            batch: Micro-batch size.
            text: Tokens of a caption.
            accumulates: Whether gradients of earlier micro-batches are there from the start.
        """
        gradients = self.new_gradients
        if accumulates:
            gradients = np.full_like(gradients, gradients[-1])
        alive = self.live @ self.sizes.growth(batch, text) + gradients
        moment = int(alive.argmax())
        return float(alive[moment]), float(gradients[moment])

    def saved_bytes(self, batch: int, text: float) -> float:
        """Bytes that the forward pass keeps for the backward pass, inputs included."""
        return float(self.saved @ self.sizes.growth(batch, text))

    def flops_per_sample(self, text: float) -> float:
        """Floating-point operations of one caption, recomputation included."""
        return sum(self.flops_by_place(text).values())

    def flops_by_place(self, text: float) -> dict[Place, float]:
        """The same for each component, forward and backward apart."""
        growth = self.sizes.growth(1, text)
        return {place: float(flops @ growth) for place, flops in self.flops.items()}


def choose_sizes(model: torch.nn.Module, image_tokens: int) -> Sizes:
    """Find sizes that cannot be taken for sizes of the model.

    Args:
        model: The model.
        image_tokens: Placeholder tokens that the language model reads for an image, or 0.
    """
    taken = {size for tensor in model.parameters() for size in (*tensor.shape, tensor.numel())}

    def free(number: int) -> bool:
        factor = _largest_prime_factor(number)
        return factor > _SMALL and all(size % factor for size in taken)

    batch = next(n for n in range(1009, 10**6) if _is_prime(n) and free(n))
    text = next(n for n in range(61, 10**6) if _is_prime(n) and free(n) and free(n + image_tokens))
    return Sizes(batch, text, text + image_tokens)


def trace_step(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    sizes: Sizes,
    *,
    autocast: torch.dtype | None,
    checkpointing: bool,
    components: Mapping[str, Sequence[nn.Module]] | None = None,
) -> Trace:
    """Run one micro-batch on the meta device.

    Args:
        model: On the meta device, in training mode, its parameters frozen or not.
        inputs: A batch of ``sizes``, on the meta device.
        loss: Runs the model on the inputs.
        sizes: From ``choose_sizes``.
        autocast: Precision of the products, ``None`` for that of the weights.
        checkpointing: Recompute activations in the backward pass.
        components: Parts of the model whose operations are counted apart.
    """
    if checkpointing:
        # Function modes are off inside of a backward pass.
        contexts = lambda: (nullcontext(), _OnDevice(autocast))  # noqa: E731
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        model.disable_input_require_grads()  # as in training
    else:
        model.gradient_checkpointing_disable()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    tracker = ComponentTracker(components or {})
    ledger = _Ledger(sizes, (*parameters, *model.buffers()), tracker)
    handles = [
        parameter.register_post_accumulate_grad_hook(ledger.gradient_arrived)
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        with tracker, ledger, _OnDevice(autocast):
            for tensor in inputs.values():
                ledger.follow(tensor)
            result = loss(inputs)
            saved = np.array(ledger.live)
            torch.autograd.backward(result)
            del result
            ledger.note()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
    return Trace(
        sizes,
        np.array(ledger.timeline, np.float64),
        np.array(ledger.gradients, np.float64),
        saved,
        {place: np.array(flops) for place, flops in ledger.flops.items()},
    )


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from its first tensor to the last, and counts operations.

    Results of what was computed before are made without asking the meta kernel again: those
    are written in Python and slow.
    """

    def __init__(self, sizes: Sizes, known: tuple[Tensor, ...], tracker: ComponentTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = sizes
        self.live = [0.0] * _CLASSES
        self.flops: dict[Place, list[float]] = defaultdict(lambda: [0.0] * _CLASSES)
        self._tracker = tracker
        self.timeline: list[tuple[float, ...]] = []
        self.gradients: list[int] = []
        self._gradient = 0
        # Never followed: weights, buffers, and gradients, which are counted apart.
        gradients = [tensor.grad for tensor in known if tensor.grad is not None]
        self._known = [tensor.untyped_storage() for tensor in (*known, *gradients)]
        self._seen = {storage._cdata for storage in self._known}
        self._results: dict[Any, Any] = {}
        self._makes_new: dict[Any, bool] = {}

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        kind, amount = self.sizes.split(storage.nbytes() // tensor.element_size())
        amount *= tensor.element_size()
        self._seen.add(key)
        self.live[kind] += amount
        weakref.finalize(storage, self._freed, key, kind, amount)

    def _freed(self, key: int, kind: int, amount: float) -> None:
        self._seen.discard(key)
        self.live[kind] -= amount

    def gradient_arrived(self, parameter: Tensor) -> None:
        """Note that a parameter has its gradient."""
        self._gradient += parameter.numel() * parameter.element_size()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = self._run(func, args, kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        self.note()
        return result

    def note(self) -> None:
        """Write down what is alive."""
        self.timeline.append(tuple(self.live))
        self.gradients.append(self._gradient)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fresh = self._makes_new.get(func)
        if fresh is None:
            returns = func._schema.returns
            fresh = not (func._schema.is_mutable or any(r.alias_info is not None for r in returns))
            self._makes_new[func] = fresh
        if not fresh:
            in_place = func.overloadpacket.__name__ in _IN_PLACE
            return args[0] if in_place else func(*args, **kwargs)
        key = (func, _describe(args), _describe(kwargs))
        known = self._results.get(key)
        if known is None:
            result = func(*args, **kwargs)
            results = result if isinstance(result, tuple) else (result,)
            flops = self._count(func, args, kwargs, result)
            if all(isinstance(tensor, Tensor) for tensor in results):
                shapes = [_shape(tensor) for tensor in results]
                self._results[key] = (isinstance(result, tuple), shapes, flops)
            return result
        several, shapes, (kind, amount) = known
        self._note_flops(kind, amount)
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device="meta")
            for size, stride, dtype in shapes
        ]
        return tuple(made) if several else made[0]

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> tuple[int, float]:
        """Count an operation's FLOPs; gives them as ``Sizes.split`` does."""
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            return 0, 0.0
        kind, amount = self.sizes.split(formula(*args, **kwargs, out_val=result))
        self._note_flops(kind, amount)
        return kind, amount

    def _note_flops(self, kind: int, amount: float) -> None:
        if amount:
            self.flops[self._tracker.place][kind] += amount


class _OnDevice(TorchFunctionMode):
    """Does on meta tensors what a GPU does: autocast, and attention without its weights.

    The meta device has no values: where a model checks one, the check passes.
    """

    _TRUTHS = frozenset((Tensor.item, Tensor.__bool__))
    _PRODUCTS = frozenset(
        (
            *(functional.linear, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm),
            *(torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm),
            *(functional.conv1d, functional.conv2d, functional.conv3d),
        )
    )

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._TRUTHS and args[0].dtype == torch.bool:
            return True
        attends = func is functional.scaled_dot_product_attention
        if self.autocast is not None and (attends or func in self._PRODUCTS):
            args, kwargs = self._cast(args), {k: self._cast(v) for k, v in kwargs.items()}
        return _attention(*args, **kwargs) if attends else func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._cast(item) for item in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.autocast)
        return value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernels that keep no weights; the meta device would take the plain one."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        (output, *_) = flash(query, key, value, dropout_p, is_causal, scale=scale)
        return cast(Tensor, output)
    mask = attn_mask
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    mask = mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    (output, *_) = efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)
    return cast(Tensor, output)


def _describe(value: Any) -> Any:
    """Everything of an argument that the shape of a result can depend on."""
    if isinstance(value, Tensor):
        return _shape(value)
    if isinstance(value, tuple | list):
        return tuple(map(_describe, value))
    if isinstance(value, dict):
        return tuple((key, _describe(item)) for key, item in value.items())
    return type(value), value


def _shape(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_prime(number: int) -> bool:
    return number > 1 and _largest_prime_factor(number) == number


def _largest_prime_factor(number: int) -> int:
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0 and number > divisor:
            number //= divisor
        divisor += 1
    return number
