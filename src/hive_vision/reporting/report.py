"""What a report says, before it is HTML or Markdown: sections of text, points, tables, figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from hive_vision.reporting.tables import Grid

_WIDE = 2  # times as wide as high
_LARGE = 1000  # pixels, from which on letters are too small to read on a telephone


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Points:
    """A list of statements, each on its own."""

    kind: ClassVar[str] = "points"
    items: Sequence[str]


@dataclass(frozen=True)
class TitledTable:
    """A table with what has to be said about it.

    Attributes:
        title: A line above it.
        grid: The cells.
        note: Sentences below it.
        is_numeric: Whether columns after the first are numbers, which stand to the right.
    """

    kind: ClassVar[str] = "table"
    title: str
    grid: Grid
    note: str = ""
    is_numeric: bool = True


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        title: A line below it.
        alt: What it shows, in words, for those who do not see it.
        png: The bytes of a PNG file.
        note: More sentences below it.
    """

    title: str
    alt: str
    png: bytes
    note: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether it needs all the room there is, as a row of maps does."""
        width, height = self._size
        return width > _WIDE * height

    @property
    def is_large(self) -> bool:
        """Whether a telephone scrolls it and does not shrink it."""
        return self._size[0] > _LARGE

    @property
    def _size(self) -> tuple[int, int]:
        return int.from_bytes(self.png[16:20]), int.from_bytes(self.png[20:24])


@dataclass(frozen=True)
class Gallery:
    """Figures side by side where there is room; one alone has all of it."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]


Block: TypeAlias = Paragraph | Points | TitledTable | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """What a table of contents links to."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class TrainedModel:
    """The one model that a report is about.

    Attributes:
        kind: ``encoder``, or ``vlm`` for a vision-language model.
        vision: Hub id or folder of the encoder that it started from.
        language: Hub id or folder of the language model.
        method: How an encoder was trained.
    """

    kind: str
    vision: str
    language: str
    method: str | None = None


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        title: The heading of the page.
        lead: A sentence below it.
        sections: In their order; no two have the same title.
        model: If it is about one trained model, which one.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    model: TrainedModel | None = None


def in_words(names: Sequence[str]) -> str:
    """Write ``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
