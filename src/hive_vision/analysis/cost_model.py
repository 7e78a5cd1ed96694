"""Memory and operations of a training stage, for any micro-batch and number of devices."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hive_vision.analysis.components import components_of
from hive_vision.analysis.tracing import Sizes, Trace, choose_sizes, trace_step
from hive_vision.models.backbones import blocks_of

# AdamW keeps two numbers for each trained parameter.
_STATES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a training step.

    Attributes:
        weights: All parameters and buffers, in float32.
        gradients: Those that are there at that moment.
        optimizer: Both moments of AdamW.
        waiting: Images and tokens of the step's other micro-batches.
        activations: What the forward pass keeps for the backward pass, its own inputs included.
        temporaries: The rest: logits, gradients of activations, workspaces of one operation.
    """

    weights: float
    gradients: float
    optimizer: float
    waiting: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class StageCost:
    """What one stage costs; ask it for any batch, text length and number of devices.

    Attributes:
        weights: Bytes of all parameters and buffers.
        trained: Bytes of the parameters that train.
        gathered: Bytes that FSDP2 holds whole at some moment: what is in no block, and the
            largest block twice (in use, and arriving).
        image: Bytes of one image as the model reads it.
        plain: Trace of a micro-batch.
        checkpointed: The same with gradient checkpointing; ``None`` if the model has none, or if
            it was not asked for.
    """

    weights: float
    trained: float
    gathered: float
    image: float
    plain: Trace
    checkpointed: Trace | None

    def trace(self, checkpointing: bool) -> Trace:
        """Give the trace with or without gradient checkpointing."""
        trace = self.checkpointed if checkpointing else self.plain
        assert trace is not None
        return trace

    def memory(
        self,
        micro_batch: int,
        tokens: float,
        *,
        share: int,
        devices: int = 1,
        sharded: bool = False,
        checkpointing: bool = False,
        on_cpu: bool = False,
    ) -> Memory:
        """Give the memory of one device.

        Args:
            micro_batch: Captions at once.
            tokens: Of the longest caption.
            share: Captions of one device in an optimiser step.
            devices: How many devices train.
            sharded: FSDP2 instead of DDP.
            checkpointing: With gradient checkpointing.
            on_cpu: The batch that is read ahead lies in the same memory.
        """
        trace = self.trace(checkpointing)
        parts = devices if sharded else 1
        # DDP's buckets hold gradients from the start, and each gradient exists beside its place.
        accumulates = micro_batch < share or devices > 1
        peak, gradients = trace.peak(micro_batch, tokens, accumulates)
        rest = peak - gradients
        saved = min(rest, trace.saved_bytes(micro_batch, tokens))
        read_ahead = share - micro_batch + (micro_batch if on_cpu else 0)
        copies = 2 if devices > 1 and not sharded else 1
        return Memory(
            weights=self.weights / parts + (self.gathered if parts > 1 else 0),
            gradients=copies * gradients / parts,
            optimizer=_STATES * self.trained / parts,
            waiting=read_ahead * self.image,
            activations=saved,
            temporaries=rest - saved,
        )


def stage_cost(
    model: PreTrainedModel,
    images: Mapping[str, Tensor],
    *,
    image_tokens: int = 0,
    autocast: torch.dtype | None = None,
    checkpointing: bool = True,
) -> StageCost:
    """Trace a model on the meta device as a stage trains it.

    Args:
        model: On the meta device, its parameters frozen or not as the stage says.
        images: What the encoder is called with for one image.
        image_tokens: How many placeholders stand for an image.
        autocast: Precision of the products, if it is another than the weights'.
        checkpointing: Also trace with gradient checkpointing, where the model has it.
    """
    sizes = choose_sizes(model, image_tokens)
    may_checkpoint = model.supports_gradient_checkpointing and checkpointing
    model.train()

    def trace(checkpointing: bool) -> Trace:
        return trace_step(
            model,
            _batch(images, sizes),
            lambda inputs: _loss(model, inputs, sizes.text),
            sizes,
            autocast=autocast,
            checkpointing=checkpointing,
            components=components_of(model),
        )

    parameters = list(model.parameters())
    image = images["pixel_values"]
    return StageCost(
        weights=sum(map(_bytes, (*parameters, *model.buffers()))),
        trained=sum(_bytes(p) for p in parameters if p.requires_grad),
        gathered=_gathered(model),
        image=_bytes(image),
        plain=trace(False),
        checkpointed=trace(True) if may_checkpoint else None,
    )


def _batch(images: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    batch, length = sizes.batch, sizes.length
    inputs = {
        name: torch.empty(batch, *image.shape[1:], dtype=image.dtype, device="meta")
        if image.is_meta
        else image.expand(batch, *image.shape[1:])
        for name, image in images.items()
    }
    with torch.device("meta"):
        return {
            **inputs,
            "input_ids": torch.empty(batch, length, dtype=torch.int64),
            "position_ids": torch.empty(batch, length, dtype=torch.int64),
            # Ready for use, as the models make it when captions of a batch differ in length.
            "attention_mask": torch.empty(batch, 1, length, length, dtype=torch.bool),
        }


def _loss(model: PreTrainedModel, inputs: Mapping[str, Tensor], text: int) -> Tensor:
    """As ``next_token_loss`` has it, with the logits of text positions only."""
    outputs = model(**inputs, logits_to_keep=text)
    targets = inputs["input_ids"][:, -text:].flatten()
    return functional.cross_entropy(outputs.logits.float().flatten(0, 1), targets)


def _gathered(model: PreTrainedModel) -> float:
    blocks = blocks_of(model)
    sizes = [sum(map(_bytes, block.parameters())) for block in blocks]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(_bytes(p) for p in model.parameters() if id(p) not in inside)
    return outside + 2 * max(sizes, default=0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
