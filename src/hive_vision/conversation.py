"""Conversations about images: what data gives, what a chat template makes token ids of."""

from dataclasses import dataclass
from typing import Literal, TypedDict

IMAGE_TOKEN = "<image>"


class Turn(TypedDict):
    """What one side said; images are ``<image>`` in the content."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as token ids, each image one ``<image>`` token.

    Attributes:
        input_ids: T token ids.
        learned: Ranges ``[start, stop)`` of them that are learned, in their order.
        problem: Why it cannot be used; a line, empty if it can.
    """

    input_ids: tuple[int, ...] = ()
    learned: tuple[tuple[int, int], ...] = ()
    problem: str = ""
