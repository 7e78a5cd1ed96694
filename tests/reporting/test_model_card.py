"""The model card says what the page says, as Markdown."""

import pytest
import yaml

from hive_vision.reporting.model_card import to_model_card
from hive_vision.reporting.report import (
    Gallery,
    Paragraph,
    Picture,
    Points,
    Report,
    Section,
    TitledTable,
    TrainedModel,
)
from hive_vision.reporting.tables import Cell, Grid
from tests.reporting.run_folders import png

GRID = Grid(["set", "hive"], [[Cell("texture"), Cell("91.2", bold=True)]])
SECTIONS = [
    Section("Summary", [Paragraph("One <b>."), Points(["first", "second"])]),
    Section("Probes", [TitledTable("Accuracy", GRID, "A note.")]),
    Section("Curves", [Gallery([Picture("stage1", "A falling line.", png())])]),
    Section("Recipe", [TitledTable("recipe.yaml", GRID, is_numeric=False)]),
]


def card(model: TrainedModel | None = None) -> tuple[dict[str, object], str]:
    text = to_model_card(Report("Report: demo", "From runs/demo.", SECTIONS, model))
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_sections_as_markdown() -> None:
    front, body = card()
    assert front["library_name"] == "transformers"
    lines = body.splitlines()
    for line in (
        "# Report: demo",
        "## Summary",
        "- second",
        "### Accuracy",
        "| texture | **91.2** |",
        "A note.",
        "*Figure in report.html: stage1.* A falling line.",
    ):
        assert line in lines
    assert lines.count("|---|---:|") == lines.count("|---|---|") == 1
    assert "One &lt;b>." in body
    assert body.endswith("|\n")


@pytest.mark.parametrize(
    ("model", "pipeline", "words"),
    [
        (
            TrainedModel("encoder", "some/vit", "some/llm", "hive"),
            "image-feature-extraction",
            ["# Vision encoder, method `hive`", "Started from `some/vit`", "AutoModel"],
        ),
        (
            TrainedModel("vlm", "some/vit", "some/llm"),
            "image-text-to-text",
            ["# Vision-language model", "`some/llm`", "AutoModelForImageTextToText"],
        ),
    ],
)
def test_one_model_has_its_own_card(model: TrainedModel, pipeline: str, words: list[str]) -> None:
    front, body = card(model)
    assert front["pipeline_tag"] == pipeline
    for word in (*words, "## Summary", "| texture | **91.2** |"):
        assert word in body
