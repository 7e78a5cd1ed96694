import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hive_vision.analysis.gradient_flow import GradientRecorder
from hive_vision.training.callbacks import (
    GradientFlowCallback,
    InterruptCallback,
    MetricsCallback,
    ProgressCallback,
)
from hive_vision.training.errors import InterruptedRunError
from hive_vision.training.pretrain import pretrain
from tests.training.conftest import stage


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


def gradient_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "encoder_gradients" in line]


def test_every_second_step_is_listened_to(tmp_path, args, state):
    encoder = nn.Sequential(*(nn.Linear(3, 3) for _ in range(2)))
    metrics = MetricsCallback(tmp_path / "metrics.jsonl", "stage3")
    callback = GradientFlowCallback(GradientRecorder(encoder), metrics, every=2)
    for number in range(5):
        state.global_step = number
        callback.on_step_begin(args, state, TrainerControl())
        listening = any(block._forward_hooks for block in encoder)
        assert listening == (number in (1, 3))
        (encoder(torch.ones(1, 3)) * (torch.nan if number == 3 else 1)).sum().backward()
        state.global_step = number + 1
        callback.on_step_end(args, state, TrainerControl())
        assert not any(block._forward_hooks for block in encoder)
    two, four = gradient_lines(tmp_path)
    assert (two["stage"], two["step"], four["step"]) == ("stage3", 2, 4)
    assert two["encoder_gradients"][1] == pytest.approx(3**0.5)
    assert four["encoder_gradients"] == [None, None], "JSON has no NaN"


def test_recording_gradients_changes_no_weight_and_goes_on(recipe, tmp_path):
    """A run that records and is interrupted is one that does neither."""

    def make(name: str, every: int):
        stages = {"stage1": stage(1, max_steps=0), "stage3": stage(3, max_steps=5)}
        output = str(tmp_path / name)
        return recipe(output=output, gradients_every=every, micro_batch_size=2, **stages)

    pretrain(make("silent", 0))
    with pytest.raises(InterruptedRunError):
        pretrain(make("recorded", 2), stop_after=("stage3", 3))
    (before,) = gradient_lines(tmp_path / "recorded")
    late = {"stage": "stage3", "step": 4, "encoder_gradients": []}  # not in the checkpoint
    with (tmp_path / "recorded" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(late) + "\n")
    pretrain(make("recorded", 2))
    silent, recorded = (
        load_file(tmp_path / name / "stage3" / "model" / "model.safetensors")
        for name in ("silent", "recorded")
    )
    assert all(torch.equal(weight, recorded[name]) for name, weight in silent.items())
    assert gradient_lines(tmp_path / "silent") == []
    lines = gradient_lines(tmp_path / "recorded")
    assert lines[0] == before
    # Nothing of stage2, whose encoder is frozen.
    assert [(line["stage"], line["step"]) for line in lines] == [("stage3", 2), ("stage3", 4)]
    norms = [norm for line in lines for norm in line["encoder_gradients"]]
    assert len(norms) == 16
    assert all(norm > 0 for norm in norms)


def test_how_often_gradients_are_recorded_is_no_negative_number(recipe):
    with pytest.raises(ValueError, match="gradients_every is -1; it must be 0 or more"):
        recipe(gradients_every=-1)
