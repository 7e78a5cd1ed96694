import json

import pytest

from hive_vision.data.replacement import BadSample
from hive_vision.training.bad_samples import BadSampleLog
from hive_vision.training.errors import TrainingError


def test_bad_samples_are_named_once_and_too_many_stop_the_run(tmp_path):
    path = tmp_path / "bad.jsonl"
    log = BadSampleLog(path, allowed=2)
    first, second = BadSample(7, "a.png", "OSError", 3), BadSample(9, "b.png", "empty", 3)
    log.note([first, second, first])
    assert not path.exists()
    log.record()
    log.note([first])
    log.record()
    assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == [7, 9]
    again = BadSampleLog(path, allowed=2)
    assert len(again) == 2
    again.note([BadSample(1, "c.png", "OSError", 2)])
    with pytest.raises(TrainingError, match="3 samples cannot be used, 2 are allowed"):
        again.record()


def test_torn_line_is_forgotten_for_good(tmp_path):
    path = tmp_path / "bad.jsonl"
    whole = json.dumps({"sample_id": 7}) + "\n"
    path.write_text(whole + '{"sample_')
    log = BadSampleLog(path, allowed=9)
    log.note([BadSample(1, "c.png", "OSError", 2)])
    log.record()
    assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == [7, 1]
    assert len(BadSampleLog(path, allowed=9)) == 2
