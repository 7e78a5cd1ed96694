"""Which model is evaluated on what, and what stands beside it."""

from pathlib import Path
from typing import Any

import pytest

from hive_vision.evaluation.vlm_benchmarks import EvaluateArguments
from hive_vision.studies import vlm
from tests.reporting.test_vlm_tables import result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    seen = []

    def evaluate(model: str, output: Path, arguments: EvaluateArguments) -> Any:
        seen.append((model, output.name, arguments.data))
        return {task: result(task, 0.5) for task in arguments.tasks}

    monkeypatch.setattr(vlm, "evaluate_vlm", evaluate)
    return seen


def test_models_alone(calls: Any, tmp_path: Path) -> None:
    found = vlm.compare_vlms(
        {"base": ["b"], "hive": ["h0", "h1"]}, tmp_path, EvaluateArguments(tasks=("gqa",))
    )
    assert list(found) == ["base", "hive"]
    assert calls == [("b", "base", None), ("h0", "hive-0", None), ("h1", "hive-1", None)]


def test_baselines_stand_before(
    calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm, "majority_answers", lambda data, tasks: {"gqa": result("gqa", 0.2)})
    monkeypatch.setattr(vlm, "blind_copies", lambda data, folder: folder)
    arguments = EvaluateArguments(tasks=("gqa",), data="copies", baselines=True)
    found = vlm.compare_vlms({"hive": ["h0", "h1"]}, tmp_path, arguments)
    assert list(found) == ["majority", "blind hive", "hive"]
    assert [len(runs) for runs in found.values()] == [2, 2, 2]
    blind = str(tmp_path / "blind-copies")
    assert calls == [
        ("h0", "blind-hive-0", blind),
        ("h1", "blind-hive-1", blind),
        ("h0", "hive-0", "copies"),
        ("h1", "hive-1", "copies"),
    ]


def test_baselines_need_the_data() -> None:
    with pytest.raises(ValueError, match="baselines needs local copies"):
        EvaluateArguments(baselines=True)
