"""The harness is run as it should be, and believed only where it really ran."""

import json
import os
import stat
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hive_vision.evaluation.vlm_benchmarks import (
    EvaluateArguments,
    evaluate_vlm,
    read_results,
)

# In place of a Python with lmms-eval: it notes how it was called and writes what it was told to.
HARNESS = """\
#!{python}
import json, os, pathlib, shutil, sys
if sys.argv[1] == "-c":
    print("0.7.3")
    sys.exit(0)
call = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
pathlib.Path({notes!r}).write_text(json.dumps(call))
print({said!r})
output = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1])
shutil.copytree({written!r}, output / "model", dirs_exist_ok=True)
"""


def sample(doc: int, answer: str, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": doc, "filtered_resps": [answer], "target": "x", **metrics}


def mme(doc: int, question: str, category: str, score: float, cognition: bool = False) -> Any:
    kind = "mme_cognition_score" if cognition else "mme_perception_score"
    fact = {"question_id": question, "category": category, "score": score}
    return sample(doc, "yes", **{kind: fact})


# Two pairs of counting, both right and one right; one pair of a cognition category, both wrong:
# (200 + 50) / 2 and 0.
MME = [
    mme(0, "a", "count", 1.0),
    mme(1, "a", "count", 1.0),
    mme(2, "b", "count", 1.0),
    mme(3, "b", "count", 0.0),
    mme(4, "c", "code_reasoning", 0.0, cognition=True),
    mme(5, "c", "code_reasoning", 0.0, cognition=True),
]
ANSWERS = [("red", 1.0), ("two", 0.0), ("no", 1.0), ("yes", 1.0)]
GQA = [sample(n, answer, exact_match=score) for n, (answer, score) in enumerate(ANSWERS)]


def written(folder: Path, **changes: Any) -> Path:
    """What the harness leaves behind."""
    folder.mkdir(parents=True)
    config = {
        "lmms_eval_specific_kwargs": {"post_prompt": "\nAnswer briefly."},
        "generation_kwargs": {"max_new_tokens": 16},
        "dataset_path": "lmms-lab-encoder/GQA",
        "dataset_name": "testdev_balanced_instructions",
        "test_split": "testdev",
    }
    content = {
        "results": {
            "mme": {
                "alias": "mme",
                "mme_perception_score,none": 125.0,
                "mme_perception_score_stderr,none": "N/A",
                "mme_cognition_score,none": 0.0,
            },
            "gqa": {"alias": "gqa", "exact_match,none": 0.75, "exact_match_stderr,none": 0.1},
        },
        "configs": {"mme": config, "gqa": config},
        "versions": {"mme": "Yaml", "gqa": "Yaml"},
        "config": {"model_args": "pretrained=x", "gen_kwargs": "max_new_tokens=16"},
    }
    content["results"] |= changes.get("results", {})
    (folder / "20260101_results.json").write_text(json.dumps(content))
    for task, samples in (("mme", MME), ("gqa", GQA)):
        lines = [json.dumps(line) + "\n" for line in samples]
        (folder / f"20260101_samples_{task}.jsonl").write_text("".join(lines))
    return folder


class Harness:
    """A fake Python; ``calls`` counts how often it ran the harness."""

    def __init__(self, folder: Path, said: str = "all well") -> None:
        self.notes = folder / "call.json"
        self.python = folder / "python"
        script = HARNESS.format(
            python=sys.executable,
            notes=str(self.notes),
            said=said,
            written=str(folder / "written"),
        )
        self.python.write_text(textwrap.dedent(script))
        self.python.chmod(self.python.stat().st_mode | stat.S_IEXEC)

    @property
    def call(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.notes.read_text())
        return content


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    written(tmp_path / "written")
    return Harness(tmp_path)


def arguments(harness: Harness, **options: Any) -> EvaluateArguments:
    return EvaluateArguments(**{"tasks": ("mme", "gqa"), "python": str(harness.python), **options})


class TestRun:
    def test_results(self, harness: Harness, tmp_path: Path) -> None:
        found = evaluate_vlm("some/model", tmp_path / "out", arguments(harness))
        assert list(found) == ["mme", "gqa"]
        assert (found["mme"].score, found["mme"].highest) == (125.0, 400.0)
        assert found["mme"].samples.mean() == pytest.approx(125 / 400)
        assert found["mme"].metrics == {"mme_perception_score": 125, "mme_cognition_score": 0}
        assert (found["gqa"].score, found["gqa"].highest) == (75.0, 100.0)
        np.testing.assert_array_equal(found["gqa"].samples, [1, 0, 1, 1])
        assert found["gqa"].answers == ("red", "two", "no", "yes")
        settings = found["gqa"].settings
        assert settings["prompts"] == {"post_prompt": "\nAnswer briefly."}
        assert settings["decoding"] == {"max_new_tokens": 16}
        assert settings["data"][0] == "lmms-lab-encoder/GQA"
        content = json.loads((tmp_path / "out" / "results.json").read_text())
        assert content["tasks"]["mme"]["score"] == 125.0
        assert content["tasks"]["gqa"]["settings"] == settings

    def test_the_call(self, harness: Harness, tmp_path: Path) -> None:
        options = {"device": "cpu", "precision": "bfloat16", "limit": 7, "include": str(tmp_path)}
        evaluate_vlm("some/model", tmp_path / "out", arguments(harness, **options))
        argv = harness.call["argv"]
        assert argv[:4] == ["-m", "lmms_eval", "--model", "llava_hf"]
        given = dict(zip(argv[2::2], argv[3::2], strict=False))
        assert given["--model_args"] == (
            "pretrained=some/model,device=cpu,device_map=cpu,dtype=bfloat16"
        )
        assert given["--tasks"] == "mme,gqa"
        assert given["--gen_kwargs"] == "max_new_tokens=16"
        assert (given["--limit"], given["--include_path"]) == ("7", str(tmp_path))
        assert "--log_samples" in argv
        assert harness.call["cwd"] == os.getcwd()

    def test_local_copies_are_the_only_data(self, harness: Harness, tmp_path: Path) -> None:
        copies = tmp_path / "copies"
        (copies / "lmms-lab-encoder" / "GQA").mkdir(parents=True)
        (copies / "lmms-lab-encoder" / "GQA" / "x.parquet").write_bytes(b"1")
        caches = []
        for content in (b"1", b"22"):
            (copies / "lmms-lab-encoder" / "GQA" / "x.parquet").write_bytes(content)
            evaluate_vlm("m", tmp_path / f"out{content!r}", arguments(harness, data=str(copies)))
            assert harness.call["cwd"] == str(copies)
            environment = harness.call["env"]
            assert environment["HF_HUB_OFFLINE"] == environment["HF_DATASETS_OFFLINE"] == "1"
            caches.append(Path(environment["HF_DATASETS_CACHE"]).name)
        assert caches[0] != caches[1], "the old data would be used again"

    def test_what_is_done_is_kept(self, harness: Harness, tmp_path: Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        first = evaluate_vlm(str(model), tmp_path / "out", arguments(harness))
        harness.notes.unlink()
        again = evaluate_vlm(str(model), tmp_path / "out", arguments(harness))
        assert not harness.notes.exists()
        assert again["gqa"].score == first["gqa"].score
        (model / "config.json").write_text("{ }")
        evaluate_vlm(str(model), tmp_path / "out", arguments(harness))
        assert harness.notes.exists(), "another model in the same place"
        harness.notes.unlink()
        evaluate_vlm(str(model), tmp_path / "out", arguments(harness, limit=5))
        assert harness.notes.exists(), "other arguments"


class TestFailures:
    """The harness ends with 0 in all of these."""

    def test_nothing_written(self, tmp_path: Path) -> None:
        (tmp_path / "written").mkdir()
        said = "Traceback\n  File x\nValueError: no such dataset\nbye"
        harness = Harness(tmp_path, said)
        with pytest.raises(RuntimeError, match="wrote no results: ValueError: no such dataset"):
            evaluate_vlm("m", tmp_path / "out", arguments(harness))
        assert not (tmp_path / "out" / "request.json").exists(), "it is run again next time"

    def test_a_sample_that_raised(self, tmp_path: Path) -> None:
        written(tmp_path / "written")
        said = "ERROR | Error Image features and image tokens do not match in generating"
        harness = Harness(tmp_path, said)
        with pytest.raises(RuntimeError, match=r"failed on 1 samples .*tokens do not match"):
            evaluate_vlm("m", tmp_path / "out", arguments(harness))

    def test_a_task_that_is_missing(self, harness: Harness, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="no results of pope, only of gqa, mme"):
            evaluate_vlm("m", tmp_path / "out", arguments(harness, tasks=("gqa", "pope")))

    def test_a_score_that_its_samples_do_not_make(self, tmp_path: Path) -> None:
        written(tmp_path / "logs", results={"gqa": {"exact_match,none": 0.5}})
        with pytest.raises(RuntimeError, match=r"reports 50\.0000 on gqa, but its samples make 75"):
            read_results(tmp_path / "logs", ["gqa"])


class TestRefusals:
    def test_no_harness(self, tmp_path: Path) -> None:
        python = tmp_path / "python"
        python.write_text(f"#!{sys.executable}\nraise ImportError('No module named decord')\n")
        python.chmod(0o755)
        options = EvaluateArguments(python=str(python))
        with pytest.raises(
            ValueError, match=r"\(ImportError: No module named decord\): pip install"
        ):
            evaluate_vlm("m", tmp_path / "out", options)
        options = EvaluateArguments(python=str(tmp_path / "gone"))
        with pytest.raises(ValueError, match="which cannot be run"):
            evaluate_vlm("m", tmp_path / "out", options)

    def test_no_data(self, harness: Harness, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="which is no folder; it should hold local copies"):
            evaluate_vlm("m", tmp_path / "out", arguments(harness, data=str(tmp_path / "gone")))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": ("scienceqa_full",)}, "have no image, on which lmms-eval"),
            ({"tasks": ()}, "tasks is empty"),
            ({"limit": 0}, "limit is 0"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ],
    )
    def test_numbers(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EvaluateArguments(**options)
