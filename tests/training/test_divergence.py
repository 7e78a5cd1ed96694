import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.training.arguments import FaultArguments
from hive_vision.training.divergence import ENOUGH, DivergenceGuard
from hive_vision.training.errors import RollBackError, TrainingError


def guard(folder, **settings):
    return DivergenceGuard(FaultArguments(**settings), folder)


def warm(watcher, steps=ENOUGH):
    for step in range(1, steps + 1):
        assert watcher.judge(step, 2.0, 1.0, [])
    return steps + 1


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_stop_names_the_samples(tmp_path, loss, norm):
    with pytest.raises(TrainingError, match=r"at step 5; its samples are named in .*divergence"):
        guard(tmp_path).judge(5, loss, norm, [3, 1])
    (event,) = [json.loads(line) for line in (tmp_path / "divergence.jsonl").open()]
    assert (event["step"], event["action"], event["sample_ids"]) == (5, "stop", [3, 1])


def test_skip_drops_steps_until_there_are_too_many(tmp_path):
    watcher = guard(tmp_path, on_divergence="skip", max_events=2)
    assert not watcher.judge(1, 1.0, math.nan, [])
    assert watcher.judge(2, 1.0, 1.0, [])
    assert not watcher.judge(3, 1.0, math.nan, [])
    with pytest.raises(TrainingError, match="after 2 earlier ones"):
        watcher.judge(4, 1.0, math.nan, [])


@pytest.mark.parametrize(
    ("settings", "loss", "norm"),
    [({"loss_spike": 1.5}, 3.1, 1.0), ({"gradient_spike": 5.0}, 2.0, 5.1)],
)
def test_spikes_are_judged_by_what_is_usual(tmp_path, settings, loss, norm):
    watcher = guard(tmp_path, on_divergence="skip", **settings)
    assert watcher.judge(0, 2.0, 100.0, []) or "gradient_spike" in settings
    step = warm(watcher)
    assert not watcher.judge(step, loss, norm, [])
    assert watcher.judge(step, 2.9, 4.9, []), "just under the limit"
    assert watcher.judge(step, 2.0, 1.0, [])


def test_nothing_spikes_before_enough_is_known_or_when_not_asked_for(tmp_path):
    early = guard(tmp_path, on_divergence="skip", gradient_spike=5.0)
    assert all(early.judge(step, 1.0, 10.0**step, []) for step in range(ENOUGH))
    never = guard(tmp_path)
    warm(never)
    assert never.judge(100, 1e9, 1e9, [])


def test_rollback_passes_over_the_data_up_to_the_bad_step(tmp_path):
    watcher = guard(tmp_path, on_divergence="rollback", max_events=1)
    with pytest.raises(RollBackError) as rollback:
        watcher.judge(12, 1.0, math.nan, [])
    assert rollback.value.step == 12
    watcher.leave_out(11, 12)
    again = guard(tmp_path, on_divergence="rollback", max_events=1)
    assert [again.leaves_out(step) for step in (10, 11, 12, 13)] == [False, True, True, False]
    with pytest.raises(TrainingError, match="after 1 earlier ones"):
        again.judge(20, 1.0, math.nan, [])


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=100), st.integers(0, 99))
def test_judgement_goes_on_from_a_checkpoint(tmp_path_factory, norms, cut):
    """Told of it half-way through JSON, as a checkpoint is, it judges the rest alike."""
    folder = tmp_path_factory.mktemp("guard")
    settings = {"on_divergence": "skip", "gradient_spike": 2.0, "max_events": 1000}
    whole, first, second = (guard(folder, **settings) for _ in range(3))
    expected = [whole.judge(step, 0.0, norm, []) for step, norm in enumerate(norms)]
    judged = [first.judge(step, 0.0, norm, []) for step, norm in enumerate(norms[:cut])]
    second.load_state(json.loads(json.dumps(first.state())))
    judged += [second.judge(step, 0.0, norm, []) for step, norm in enumerate(norms[cut:])]
    assert judged == expected


def test_impossible_settings_are_refused():
    for settings in ({"loss_spike": 0.5}, {"max_events": -1}, {"grace_seconds": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            FaultArguments(**settings)
