import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hive_vision.training.callbacks import InterruptCallback, MetricsCallback, ProgressCallback
from hive_vision.training.errors import InterruptedRunError


@pytest.fixture
def state():
    state = TrainerState(max_steps=20)
    state.is_world_process_zero = True
    return state


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), report_to="none")


def test_metrics_are_appended_as_json_lines(tmp_path, args, state):
    callback = MetricsCallback(tmp_path / "metrics.jsonl", "stage2")
    for step in (1, 2):
        state.global_step = step
        callback.on_log(args, state, TrainerControl(), {"loss": step / 2})
    callback.on_log(args, state, TrainerControl(), None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "stage2", "step": 1, "loss": 0.5},
        {"stage": "stage2", "step": 2, "loss": 1.0},
    ]


def test_progress_without_a_terminal_is_ten_lines_with_an_eta(args, state, caplog):
    callback = ProgressCallback("stage1")
    control = TrainerControl()
    with caplog.at_level(logging.INFO, logger="hive_vision"):
        callback.on_train_begin(args, state, control)
        for step in range(1, 21):
            state.global_step = step
            callback.on_step_end(args, state, control)
            callback.on_log(args, state, control, {"loss": 1.5})
        callback.on_train_end(args, state, control)
    assert len(caplog.messages) == 10
    assert "stage1  20/20  loss 1.500" in caplog.messages[-1]
    assert "ETA 0:00:00" in caplog.messages[-1]


def test_ctrl_c_saves_and_stops_and_a_second_one_stops_at_once(args, state):
    before = signal.getsignal(signal.SIGINT)
    control = TrainerControl()
    with InterruptCallback(grace_seconds=60) as interrupt:
        interrupt.on_train_begin(args, state, control)
        interrupt.on_step_end(args, state, control)
        assert not control.should_save
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # what a launcher passes on at the same moment
        interrupt.on_step_end(args, state, control)
        assert interrupt.signal_number == signal.SIGINT
        assert control.should_save
        assert control.should_training_stop
        interrupt._first -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_saves_and_stops(args, state):
    before = signal.getsignal(signal.SIGTERM)
    control = TrainerControl()
    with InterruptCallback(grace_seconds=60) as interrupt:
        interrupt.on_train_begin(args, state, control)
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.on_step_end(args, state, control)
        assert interrupt.signal_number == signal.SIGTERM
        assert control.should_training_stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_the_process_when_saving_takes_longer_than_the_grace():
    script = (
        "import os, signal, time\n"
        "from hive_vision.training.callbacks import InterruptCallback\n"
        "with InterruptCallback(grace_seconds=0.2) as interrupt:\n"
        "    interrupt.on_train_begin(None, None, None)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 128 + signal.SIGTERM
    assert "not saved within 0.2 s of SIGTERM" in completed.stderr


def test_a_run_can_be_told_where_to_stop(args, state):
    control = TrainerControl()
    interrupt = InterruptCallback(grace_seconds=60, stop_after=(Path(args.output_dir).name, 3))
    state.global_step = 2
    interrupt.on_step_end(args, state, control)
    assert not control.should_training_stop
    state.global_step = 3
    interrupt.on_step_end(args, state, control)
    assert control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_steps_ends_the_run_at_once(args, state, number):
    with InterruptCallback(grace_seconds=60) as interrupt:
        interrupt.on_train_begin(args, state, TrainerControl())
        interrupt.on_train_end(args, state, TrainerControl())
        with pytest.raises(InterruptedRunError) as stop:
            os.kill(os.getpid(), number)
        assert stop.value.signal_number == number
