"""What differences and their 95% intervals allow to say, in plain sentences, and no more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, TypeAlias

from hive_vision.analysis.intervals import CONFIDENCE
from hive_vision.reporting.report import in_words

MANY = 10  # differences, from which on some leave zero out by chance
_FEW = 2  # pairs that are named one by one


@dataclass(frozen=True)
class Finding:
    """What the better one has more than the worse one, with the ends of the interval."""

    better: str
    worse: str
    mean: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0


# Test -> what was found between each two methods.
Findings: TypeAlias = Mapping[str, Sequence[Finding]]


def read_findings(differences: Mapping[str, Iterable[Mapping[str, Any]]], scale: float) -> Findings:
    """Read the differences of a ``results.json``.

    Args:
        differences: Test -> differences, first minus second.
        scale: Makes points of them.
    """
    return {
        test: [_finding(difference, scale) for difference in found]
        for test, found in differences.items()
    }


def _finding(difference: Mapping[str, Any], scale: float) -> Finding:
    first, second = difference["first"], difference["second"]
    mean, low, high = (scale * difference[key] for key in ("mean", "low", "high"))
    if mean < 0:
        return Finding(second, first, -mean, -high, -low)
    return Finding(first, second, mean, low, high)


def leader(names: Sequence[str], found: Sequence[Finding]) -> str | None:
    """Name the method that is certainly better than each other one, if one is."""
    beaten: dict[str, set[str]] = {name: set() for name in names}
    for finding in found:
        if finding.is_certain and finding.better in beaten:
            beaten[finding.better].add(finding.worse)
    best = [name for name in names if {name, *beaten[name]} >= set(names)]
    return best[0] if best and len(names) > 1 else None


def verdicts(names: Sequence[str], findings: Findings) -> list[str]:
    """Say which method did better on what, only where the intervals do.

    Args:
        names: The methods; baselines are none.
        findings: Differences in points.
    """
    compared = {test: found for test, found in findings.items() if found}
    if len(names) < 2 and not compared:
        return ["One model: there is no other one to compare it with."]
    tests: dict[str, list[str]] = {}  # of which the same is said
    for test, found in findings.items():
        tests.setdefault(_sentence(found), []).append(test)
    return [
        *([_headline(names, findings)] if len(names) > 1 else []),
        *(f"{in_words(same)}: {sentence}" for sentence, same in tests.items()),
        *_by_chance(names, findings),
    ]


def _headline(names: Sequence[str], findings: Findings) -> str:
    leads: dict[str, list[str]] = {}
    for test, found in findings.items():
        best = leader(names, found)
        if best is not None:
            leads.setdefault(best, []).append(test)
    count = len(findings)
    if not leads:
        where = "the one set" if count == 1 else f"any of the {count} sets"
        return f"No method is better than every other one on {where}."
    texts = [f"{name} on {in_words(tests)}" for name, tests in leads.items()]
    rest = count - sum(len(tests) for tests in leads.values())
    sets = "set" if rest == 1 else f"{rest} sets"
    others = f"; on the other {sets} no method is better than every other one" if rest else ""
    return f"Better than every other method: {in_words(texts)}{others}."


def _sentence(found: Sequence[Finding]) -> str:
    better: dict[str, list[Finding]] = {}
    for finding in found:
        if finding.is_certain:
            better.setdefault(finding.better, []).append(finding)
    alike = [f for f in found if not f.is_certain]
    texts = []
    for name, own in sorted(better.items(), key=lambda item: -len(item[1])):
        than = [
            f"than {f.worse} by {_points(f.mean)} points ({_points(f.low)} to {_points(f.high)})"
            for f in own
        ]
        texts.append(f"{name} is better {in_words(than)}")
    names = dict.fromkeys(name for f in found for name in sorted((f.better, f.worse)))
    if not found:
        texts.append("nothing can be compared")
    elif 1 < comb(len(names), 2) == len(alike):
        texts.append(f"no difference can be told between any two of {in_words(list(names))}")
    elif alike:
        pairs = " or between ".join(in_words(sorted((f.better, f.worse))) for f in alike)
        if better and len(alike) > _FEW:
            pairs = "any other two that are compared"
        texts.append(f"no difference can be told between {pairs}")
    return "; ".join(texts) + "."


def _points(value: float) -> str:
    return f"{value:.1f}" if round(value, 1) else f"{value:.2f}"


def _by_chance(names: Sequence[str], findings: Findings) -> list[str]:
    """Say how many differences chance alone would make; baselines are there to be beaten."""
    between = [f for own in findings.values() for f in own if {f.better, f.worse} <= set(names)]
    count, certain = len(between), sum(finding.is_certain for finding in between)
    if count < MANY:
        return []
    expected = max(1, round((1 - CONFIDENCE) * count))
    return [
        f"These are {count} differences. Even if no method differed from another, about {expected} "
        f"of so many {CONFIDENCE:.0%} intervals would leave zero out by chance; here {certain} "
        f"{'does' if certain == 1 else 'do'}."
    ]
