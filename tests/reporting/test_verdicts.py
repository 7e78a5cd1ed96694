"""Sentences claim what the intervals claim, and nothing else."""

from typing import Any

import pytest

from hive_vision.reporting.verdicts import Finding, leader, read_findings, verdicts


def difference(first: str, second: str, mean: float, half: float) -> dict[str, Any]:
    return {"first": first, "second": second, "mean": mean, "low": mean - half, "high": mean + half}


def said(*differences: dict[str, Any], names: tuple[str, ...] = ("base", "hive")) -> list[str]:
    return verdicts(names, read_findings({"texture": differences}, scale=100.0))


def test_a_certain_difference_has_its_size_and_interval() -> None:
    headline, sentence = said(difference("hive", "base", 0.05, 0.02))
    assert headline == "Better than every other method: hive on texture."
    assert sentence == "texture: hive is better than base by 5.0 points (3.0 to 7.0)."


def test_the_better_one_comes_first_whatever_the_sign() -> None:
    _, sentence = said(difference("hive", "base", -0.05, 0.02))
    assert sentence == "texture: base is better than hive by 5.0 points (3.0 to 7.0)."


@pytest.mark.parametrize("mean", [0.05, -0.05, 0.0])
def test_no_difference_where_the_interval_includes_zero(mean: float) -> None:
    headline, sentence = said(difference("hive", "base", mean, 0.06))
    assert headline.startswith("No method is better")
    assert sentence == "texture: no difference can be told between base and hive."


THREE = ("base", "sa", "hive")


def test_some_certain_some_not() -> None:
    headline, sentence = said(
        difference("sa", "base", 0.01, 0.02),
        difference("hive", "base", 0.05, 0.02),
        difference("hive", "sa", 0.04, 0.02),
        names=THREE,
    )
    assert "hive on texture" in headline
    assert "hive is better than base by 5.0 points (3.0 to 7.0) and than sa by 4.0" in sentence
    assert sentence.endswith("; no difference can be told between base and sa.")


def test_better_than_some_is_not_better_than_every_other() -> None:
    headline, sentence = said(
        difference("sa", "base", 0.04, 0.02),
        difference("hive", "base", 0.05, 0.02),
        difference("hive", "sa", 0.01, 0.02),
        names=THREE,
    )
    assert headline == "No method is better than every other one on the one set."
    assert "between hive and sa" in sentence


def test_nothing_can_be_told_of_all_in_one_go() -> None:
    pairs = [("sa", "base"), ("hive", "base"), ("hive", "sa")]
    _, sentence = said(*(difference(*pair, 0.0, 0.02) for pair in pairs), names=THREE)
    assert sentence == "texture: no difference can be told between any two of base, sa and hive."
    _, sentence = said(*(difference(*pair, 0.0, 0.02) for pair in pairs[:2]), names=THREE)
    assert "between base and sa or between base and hive" in sentence, "sa and hive: not compared"


def test_many_pairs_without_a_difference_are_not_all_named() -> None:
    differences = [difference("hive", other, 0.0, 0.02) for other in "abc"]
    _, sentence = said(difference("hive", "base", 0.05, 0.02), *differences)
    assert sentence.endswith("no difference can be told between any other two that are compared.")


def test_a_tiny_certain_difference_is_not_written_as_zero() -> None:
    _, sentence = said(difference("hive", "base", 0.0003, 0.0001))
    assert "by 0.03 points (0.02 to 0.04)" in sentence


def test_chance_is_named_where_much_is_compared() -> None:
    one = difference("hive", "base", 0.05, 0.02)
    many = read_findings({f"set{n}": [one] for n in range(40)}, scale=100.0)
    sentences = verdicts(["base", "hive"], many)
    assert "40 differences" in sentences[-1]
    assert "about 2 of so many 95% intervals" in sentences[-1]
    assert sentences[-1].endswith("by chance; here 40 do.")
    assert not any("by chance" in sentence for sentence in said(one))


def test_what_is_counted_for_chance() -> None:
    """Each pair of methods on each set; that a baseline is beaten is no surprise."""
    pairs = [difference("hive", "base", 0.05, 0.02), difference("sa", "base", 0.0, 0.02)]
    beaten = difference("hive", "majority", 0.3, 0.02)

    def last(sets: int) -> str:
        found = {f"set{n}": [*pairs, beaten] for n in range(sets)}
        return verdicts(THREE, read_findings(found, scale=100.0))[-1]

    assert last(20).startswith("These are 40 differences. ")
    assert "about 2 of so many" in last(20)
    assert last(20).endswith("here 20 do.")
    assert "about 1 of so many" in last(5)
    assert "by chance" not in last(4)


def test_the_headline_counts_sets() -> None:
    clear, close = difference("hive", "base", 0.05, 0.02), difference("hive", "base", 0.0, 0.02)
    sets = {"kind": [clear], "texture": [clear], "shape": [close], "digit": [close]}
    headline = verdicts(["base", "hive"], read_findings(sets, scale=100.0))[0]
    assert "hive on kind and texture; on the other 2 sets no method" in headline
    del sets["digit"]
    headline = verdicts(["base", "hive"], read_findings(sets, scale=100.0))[0]
    assert "on the other set no method" in headline


def test_who_is_better_than_more_comes_first() -> None:
    sentence = said(
        difference("sa", "base", 0.05, 0.02),
        difference("hive", "base", 0.09, 0.02),
        difference("hive", "sa", 0.04, 0.02),
        names=THREE,
    )[1]
    assert sentence.startswith("texture: hive is better than base by 9.0")
    assert "; sa is better than base by 5.0" in sentence


def test_sets_of_which_the_same_is_said_share_a_sentence() -> None:
    close, clear = difference("hive", "base", 0.0, 0.02), difference("hive", "base", 0.05, 0.02)
    found = read_findings({"kind": [close], "texture": [clear], "digit": [close]}, scale=100.0)
    _, alike, certain = verdicts(["base", "hive"], found)
    assert alike == "kind and digit: no difference can be told between base and hive."
    assert certain.startswith("texture: hive is better")


def test_one_model_is_compared_with_nothing() -> None:
    (sentence,) = verdicts(["hive"], {"texture": []})
    assert "no other one" in sentence


def test_the_leader_beats_every_other_one() -> None:
    win, close = Finding("a", "b", 2, 1, 3), Finding("a", "c", 2, -1, 5)
    assert leader(["a", "b"], [win]) == "a"
    assert leader(["a", "b", "c"], [win, close]) is None
    assert leader(["a"], []) is None
    assert leader(["a", "b"], [win, Finding("baseline", "a", 2, 1, 3)]) == "a"
