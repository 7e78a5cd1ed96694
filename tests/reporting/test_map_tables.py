"""What tables and sentences say of planted differences."""

import re
from dataclasses import replace

import numpy as np
import pytest

from hive_vision.analysis.findings import MapFindings
from hive_vision.analysis.gradient_flow import GradientFlow
from hive_vision.reporting.map_tables import claims, flow_grid, pointing_grid, training_note
from tests.reporting.planted import LAYERS, SAMPLES, findings, flow, numbers


def said(found: MapFindings, *words: str) -> str:
    (sentence,) = [s for s in claims(found) if all(word in s for word in words)]
    return sentence


def test_a_clear_difference_is_told_with_its_factor() -> None:
    sentence = said(findings(), "first third of the layers gets")
    factor, low, high = map(float, re.findall(r"\d+\.\d+", sentence))
    assert factor == pytest.approx(8, rel=0.05)
    assert low < 8 < high
    assert "gradient in hive that it gets in sa" in sentence
    assert "no difference" not in sentence


def test_no_difference_is_none() -> None:
    alike = findings(flows={"hive": flow(0.5), "cascaded": flow(0.5, seed=9)})
    sentence = said(alike, "first third of the layers gets")
    assert sentence.endswith("in cascaded: no difference can be told.")


def test_every_pair_is_compared() -> None:
    three = findings(flows={"a": flow(1), "b": flow(2), "c": flow(3)})
    pairs = [re.findall(r"in (\w) that it gets in (\w)", s) for s in claims(three)]
    assert [pair[0] for pair in pairs if pair] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_directions_are_told_only_where_they_are_certain() -> None:
    found = findings()
    assert "are more even than" in said(found, "hive: gradient maps")
    assert "no difference can be told between" in said(found, "sa:", "gradient maps")
    assert "more concentrated" in said(
        findings(flows={"x": flow(1, later_entropy=-0.1)}), "x: gradient"
    )
    assert "is more dispersed than" in said(found, "hive: attention")
    assert "no difference can be told between" in said(found, "sa:", "last attending layer")
    assert "more local" in said(findings(numbers={"x": numbers(-0.1, 0.2)}), "x: attention")
    hive, sa = said(found, "hive:", "own words"), said(found, "sa:", "own words")
    assert "are more attentive to it than those for other objects" in hive
    assert re.search(r"\+0\.2[45]\d, 95%", hive)  # 0.4 and 0.5, where those of others put 0.2
    assert "no difference can be told" in sa


def test_one_layer_is_not_compared_with_itself() -> None:
    whole = numbers(0.1, 0.4)
    one = replace(whole, distance=whole.distance[:, :1])
    assert not [s for s in claims(findings(numbers={"x": one})) if "attending layer" in s]


def test_the_last_word_is_that_another_training_was_not_seen() -> None:
    assert "not that another training would end elsewhere" in claims(findings())[-1]
    assert claims(findings(flows={}, numbers={})) == []


def test_without_masks_nothing_is_said_of_words() -> None:
    blind = numbers(0.1, 0.4)
    found = findings(numbers={"x": replace(blind, pointing=[])})
    assert pointing_grid(found) is None
    assert not [s for s in claims(found) if "own words" in s]


def test_weight_updates_of_different_trainings() -> None:
    alike = findings(
        encoder_training={"hive": "stage3 9 steps at 0.1", "sa": "stage3 9 steps at 0.1"}
    )
    assert training_note(findings()) == training_note(alike) == ""
    note = training_note(
        findings(encoder_training={"hive": "frozen", "sa": "stage3 9 steps at 0.1"})
    )
    assert note.endswith("not of the same training (hive: frozen, sa: stage3 9 steps at 0.1)")


def test_flow_table() -> None:
    short = flow(4.0)
    short = GradientFlow(*(part[:, :4] for part in vars(short).values()))
    titled = flow_grid(findings(flows={"hive": flow(2.0), "x": short}))
    assert titled is not None
    title, grid, note = titled
    assert grid.headings == ["layer", "hive", "x"]
    assert [row[0].text for row in grid.rows] == [str(layer) for layer in range(1, LAYERS + 1)]
    mean, low, high = map(float, re.findall(r"[\d.]+", grid.rows[0][1].text))
    assert mean == pytest.approx(2, rel=0.05)
    assert low <= mean <= high
    assert grid.rows[-1][1].text == "1.00 [1.00, 1.00]"
    assert grid.rows[-1][2].text == "-"
    assert f"{SAMPLES} samples of planted" in note
    assert "Gradient" in title
    assert flow_grid(findings(flows={})) is None


def test_pointing_table() -> None:
    titled = pointing_grid(findings())
    assert titled is not None
    _, grid, note = titled
    hive, sa = ([cell.text for cell in row] for row in grid.rows)
    assert (hive[0], sa[0]) == ("hive", "sa")
    means = [float(text.split(" [")[0]) for text in hive[1:]]
    np.testing.assert_allclose(means, [45, 20, 20, 25, 50, 25], atol=1)
    assert "of images that have several" in " ".join(note.split())
