"""A report as a model card: the Markdown that hubs show, with their front matter."""

from collections.abc import Iterator

from hive_vision.models.export import encoder_card
from hive_vision.models.vlm import vlm_card
from hive_vision.reporting.report import Block, Gallery, Paragraph, Points, Report, TitledTable

_SEVERAL = """---
library_name: transformers
tags:
- vision
- hive-vision
---
"""


def to_model_card(report: Report) -> str:
    """Write a report as Markdown.

    Args:
        report: About one model, whose card it becomes, or about several. Figures stay in the page.
    """
    model, body = report.model, "\n".join(_body(report)).strip()
    if model is None:
        return f"{_SEVERAL}\n# {_plain(report.title)}\n\n{body}\n"
    if model.kind == "vlm":
        card = vlm_card(model.vision, model.language, body)
    else:
        card = encoder_card(model.vision, model.method, body)
    return card.rstrip() + "\n"


def _body(report: Report) -> Iterator[str]:
    yield f"{_plain(report.lead)}\n"
    for section in report.sections:
        yield f"## {_plain(section.title)}\n"
        for block in section.blocks:
            yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Paragraph():
            yield f"{_plain(block.text)}\n"
        case Points():
            yield "".join(f"- {_plain(item)}\n" for item in block.items)
        case TitledTable():
            yield f"### {_plain(block.title)}\n"
            yield _plain(block.grid.to_markdown(block.is_numeric))
            if block.note:
                yield f"{_plain(block.note)}\n"
        case Gallery():
            for picture in block.pictures:
                yield f"*Figure in report.html: {_plain(picture.title)}.* {_plain(picture.alt)}\n"


def _plain(text: str) -> str:
    """Keep what looks like HTML from being taken for it."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
