"""What a training command does when its training ends early."""

import signal
from typing import Any

import pytest

from hive_vision.cli.runs import run_training
from hive_vision.training.errors import InterruptedRunError


def test_results_are_passed_on(tmp_path: Any) -> None:
    assert run_training(str(tmp_path), lambda: {"a": 1}) == {"a": 1}


def test_an_interruption_says_how_to_go_on(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> dict[str, Any]:
        raise InterruptedRunError("stage1 stopped after step 3, saved", signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        run_training(str(tmp_path), stopped)
    assert ended.value.code == 128 + signal.SIGTERM
    line = "stage1 stopped after step 3, saved; run the same command again to go on\n"
    assert capsys.readouterr().err == line
