"""A report as one HTML page that needs nothing else: no network, no scripts, no other files."""

from base64 import b64encode
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hive_vision.reporting.report import Report

_TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Report) -> str:
    """Write a report as a page.

    Args:
        report: What it says; every text of it is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["base64"] = _base64
    # The style is ours and no text of a report.
    style = Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))
    template = environment.get_template("report.html")
    return template.render(report=report, style=style, version=version("hive-vision")) + "\n"


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")
