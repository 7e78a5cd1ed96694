"""The page: whole, safe, and made of elements that mean something."""

import re
from html.parser import HTMLParser

import pytest

from hive_vision.reporting.html import to_html
from hive_vision.reporting.report import (
    Gallery,
    Paragraph,
    Picture,
    Points,
    Report,
    Section,
    TitledTable,
)
from hive_vision.reporting.tables import Cell, Grid
from tests.reporting.run_folders import png

EVIL = '<script>alert("x")</script>&'
GRID = Grid(["set", "hive"], [[Cell("texture"), Cell("91.2", bold=True)]])


def report(*sections: Section) -> Report:
    return Report("Report: demo", "From runs/demo.", sections)


EVERYTHING = report(
    Section("Summary", [Paragraph("One."), Points(["first", "second"])]),
    Section("Probes", [TitledTable("Accuracy", GRID, "A note.")]),
    Section("Learning curves", [Gallery([Picture("stage1", "A falling line.", png(), "More.")])]),
    Section("Recipe", [TitledTable("recipe.yaml", GRID, is_numeric=False)]),
)


class Elements(HTMLParser):
    """Collects elements, and sees that what opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def elements(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_loads_nothing() -> None:
    page = to_html(EVERYTHING)
    found = elements(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.found}
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page
    for image in found.all("img"):
        assert (image["src"] or "").startswith("data:image/png;base64,")
    assert all((link["href"] or "").startswith("#") for link in found.all("a"))
    policies = [meta for meta in found.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in (policies[0]["content"] or "")


def test_everything_is_there() -> None:
    page = to_html(EVERYTHING)
    found = elements(page)
    assert "<h1>Report: demo</h1>" in page
    for text in ("From runs/demo.", "<p>One.</p>", "<li>second</li>", "A note.", "<b>stage1</b>"):
        assert text in page
    assert "<strong>91.2</strong>" in page
    assert [image["alt"] for image in found.all("img")] == ["A falling line."]
    assert {cell["scope"] for cell in found.all("th")} == {"col", "row"}
    regions = [div["aria-label"] for div in found.all("div") if div.get("class") == "scroll"]
    assert regions == ["Accuracy", "recipe.yaml"]


def test_contents_of_a_long_page() -> None:
    links = elements(to_html(EVERYTHING)).all("a")
    sections = elements(to_html(EVERYTHING)).all("section")
    assert [link["href"] for link in links] == [f"#{section['id']}" for section in sections]
    assert elements(to_html(report(*EVERYTHING.sections[:3]))).all("nav") == []


@pytest.mark.parametrize(
    "section",
    [
        Section(EVIL, []),
        Section("x", [Paragraph(EVIL)]),
        Section("x", [Points([EVIL])]),
        Section("x", [TitledTable(EVIL, Grid([EVIL, EVIL], [[Cell(EVIL), Cell(EVIL)]]), EVIL)]),
        Section("x", [Gallery([Picture(EVIL, f'"{EVIL}', png(), EVIL)])]),
    ],
)
def test_every_text_is_escaped(section: Section) -> None:
    page = to_html(report(section))
    assert elements(page).all("script") == []
    assert "&lt;script&gt;" in page


def test_the_same_report_is_the_same_page() -> None:
    assert to_html(EVERYTHING) == to_html(EVERYTHING)


def test_it_is_made_for_print_and_telephones() -> None:
    page = to_html(EVERYTHING)
    assert "@media print" in page
    assert 'content="width=device-width' in page
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", page)
    assert re.search(r"img \{[^}]*max-width: 100%", page)


def test_a_telephone_scrolls_what_it_could_only_shrink() -> None:
    large, small = (Picture(f"{width}", "alt", png(width, 900)) for width in (1001, 1000))
    page = to_html(report(Section("x", [Gallery([large, small])])))
    regions = elements(page).all("div")
    assert [div["aria-label"] for div in regions if "large" in (div["class"] or "")] == ["1001"]
    assert re.search(r"max-width: 40rem\) \{ \.large img \{ max-width: none", page)


def test_a_wide_figure_has_all_the_room() -> None:
    wide, narrow = (Picture("title", "alt", png(width, 40)) for width in (200, 40))
    found = elements(to_html(report(Section("x", [Gallery([wide, narrow])]))))
    assert [figure.get("class") for figure in found.all("figure")] == ["wide", None]
