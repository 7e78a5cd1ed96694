import json
import logging
import os
import signal

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hive_vision.training.callbacks import InterruptCallback, MetricsCallback, ProgressCallback


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
    with InterruptCallback() as interrupt:
        interrupt.on_step_end(args, state, control)
        assert not control.should_save
        os.kill(os.getpid(), signal.SIGINT)
        interrupt.on_step_end(args, state, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
