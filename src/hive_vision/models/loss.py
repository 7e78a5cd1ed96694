"""The language-modelling loss shared by every method (equation 1).

Shapes: B captions, T tokens, S supervised tokens, E language-model width, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

IGNORE_INDEX = -100
# Above this many logits (1 GiB in float32) they are computed and recomputed in chunks: below
# it, chunking only costs time (measured 1.2-1.8x slower by our cost study).
MAX_LOGITS = 2**28

Head = Callable[[Tensor], Tensor]


def language_logits(
    hidden: Tensor, output_embeddings: nn.Module, text_config: PreTrainedConfig
) -> Tensor:
    """Map final hidden states (..., E) to logits (..., V) as the language model itself does.

    Args:
        hidden: What leaves the language model's trunk.
        output_embeddings: Its output projection.
        text_config: Its configuration; some families scale or cap their logits.
    """
    logits: Tensor = output_embeddings(hidden)
    multiplier = getattr(text_config, "logit_scale", None)  # Cohere
    if multiplier is not None:
        logits = logits * multiplier
    divisor = getattr(text_config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def largest_logits(output_embeddings: nn.Module) -> float:
    """How many logits may be computed at once.

    A sharded output projection must be called exactly once in a forward pass, on every process:
    FSDP2 gathers it for the call (tied embeddings with it), and after a second call silently
    loses gradients (measured: half the gradient norm of the first step).

    Args:
        output_embeddings: The language model's output projection.
    """
    return math.inf if isinstance(output_embeddings, FSDPModule) else MAX_LOGITS


def next_token_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    vocabulary: int,
    num_items_in_batch: Tensor | int | None = None,
    max_logits: float = MAX_LOGITS,
) -> Tensor:
    """Cross-entropy of the next token, with logits for supervised positions only, in float32.

    Args:
        hidden: Final states (B, T, E).
        labels: (B, T); -100 is not supervised. Position t is predicted from t - 1.
        head: Maps (S, E) to logits (S, V).
        vocabulary: V.
        num_items_in_batch: What the summed loss is divided by: the number of supervised tokens
            of the whole global batch, so that accumulation and world size change nothing. The
            number in ``labels`` if not given.
        max_logits: Above this many logits the loss is computed in chunks, recomputed in the
            backward pass; see ``largest_logits``.

    Returns:
        A scalar; zero (with a gradient of zero) if nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    targets, hidden = targets[supervised], hidden[:, :-1][supervised]

    def summed(hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    count = len(targets)
    # The head is called for no positions too: where it is sharded, other processes wait for it.
    if count * vocabulary <= max_logits:
        total = summed(hidden, targets)
    else:
        rows = max(1, int(max_logits) // vocabulary)
        total = torch.stack(
            [
                checkpoint(summed, h, t, use_reentrant=False)
                for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            ]
        ).sum()
    if count == 0:
        return total
    return total / (count if num_items_in_batch is None else num_items_in_batch)
