import json
import subprocess
import sys

import pytest
import yaml

from hive_vision.training.arguments import FaultArguments
from hive_vision.training.run_folder import RunFolder, recipe_differences


def test_new_folder_records_recipe_and_environment(recipe):
    arguments = recipe()
    run = RunFolder(arguments)
    assert not run.path.exists()
    run.create()
    saved = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert saved["stage1"]["rules"]["projectors"] == 1e-2
    assert "torch" in json.loads((run.path / "environment.json").read_text())["versions"]
    RunFolder(arguments).check()  # the same recipe may go on
    assert run.results is None
    assert run.stage_result("stage1") is None


def test_changed_recipe_is_refused_with_the_difference(recipe):
    RunFolder(recipe()).create()
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        RunFolder(recipe(seed=1)).check()


def test_file_as_output_is_refused(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        RunFolder(recipe()).check()


def test_foreign_folder_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not empty and not a run"):
        RunFolder(recipe()).check()


def test_differences_ignore_where_the_run_lies_and_what_spares_memory():
    old = {"output": "a", "stage1": {"max_steps": 1}, "gradient_checkpointing": False}
    new = {"output": "b", "stage1": {"max_steps": 2}, "gradient_checkpointing": True}
    assert recipe_differences(old, new) == ["stage1.max_steps: 1 -> 2"]


def test_keys_of_a_later_version_do_not_make_an_old_run_foreign(recipe):
    run = RunFolder(recipe())
    run.create()
    saved = yaml.safe_load((run.path / "recipe.yaml").read_text())
    del saved["faults"], saved["sharding"]
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    RunFolder(recipe()).check()


def test_what_is_done_about_a_fault_may_change(recipe):
    RunFolder(recipe()).create()
    faults = FaultArguments(on_divergence="skip", loss_spike=5.0)
    RunFolder(recipe(faults=faults, data={"max_bad_fraction": 0.5})).check()


def test_second_start_of_a_running_run_is_refused(recipe):
    run = RunFolder(recipe())
    run.create()
    script = (
        "import fcntl, sys, time\n"
        f"file = open({str(run.path / '.lock')!r}, 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="another process is training in"), run.locked():
            pass
        other.kill()
    with run.locked():
        pass
