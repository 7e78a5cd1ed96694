import pytest

from hive_vision.cli import main
from hive_vision.studies import resume_test
from hive_vision.studies.resume_test import ResumeProof, StageProof
from tests.cli.helpers import failure


def test_help_says_what_is_proven(capsys):
    main(["resume-test", "--help"])
    text = capsys.readouterr().out
    for word in ("RECIPE", "steps=N", "debug", "2N", "GPU"):
        assert word in text


def test_steps_that_are_no_number_are_one_line(capsys):
    assert "steps is 'many'" in failure(capsys, "resume-test", "debug", "steps=many")


@pytest.mark.parametrize("holds", [True, False])
def test_verdict_and_exit_code(capsys, monkeypatch, tmp_path, holds):
    stages = [StageProof("stage1", True, holds, 0.0 if holds else 0.5, "" if holds else "a.weight")]
    proof = ResumeProof(3, stages, [], None if holds else tmp_path)
    seen = []

    def prove(arguments, steps):
        seen.append((arguments.method, steps))
        return proof

    monkeypatch.setattr(resume_test, "prove_resume", prove)
    if holds:
        main(["resume-test", "debug", "steps=3", "method=sa"])
    else:
        with pytest.raises(SystemExit) as stop:
            main(["resume-test", "debug", "steps=3", "method=sa"])
        assert stop.value.code == 1
    assert seen == [("sa", 3)]
    text = capsys.readouterr().out
    assert "stage1" in text
    assert ("NO" in text) == (not holds)
