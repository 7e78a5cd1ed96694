"""VLM benchmarks through lmms-eval, in a process of its own, and a check that they really ran.

The harness ends with 0 when it failed, and counts a sample that raised as a wrong answer: neither
is taken for a result here.

Shapes: M samples of a task.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hive_vision.data.sources import hash_parts
from hive_vision.folders import read_json, write_json

logger = logging.getLogger(__name__)

PAPER_TASKS = ("mme", "gqa", "ok_vqa_val2014", "scienceqa_img")
MME_METRICS = ("mme_perception_score", "mme_cognition_score")
MME_CATEGORY = 200.0  # the most that one of its categories gives
# lmms-eval's llava_hf raises on the first, and reads the image before on the second kind of model.
_TEXT_ONLY = ("scienceqa", "scienceqa_full")


@dataclass(frozen=True)
class EvaluateArguments:
    """How models are evaluated.

    Args:
        tasks: Names of lmms-eval tasks.
        data: Folder with local copies under the hub's names (lmms-lab-encoder/MME, ...); they are
            then the only data, no network is asked. Null loads from the hub.
        include: Folder with task files of one's own, as lmms-eval's --include_path.
        python: Python of the environment that lmms-eval is installed in; this one if null.
        device: cpu, cuda:0 or auto.
        precision: Of the weights.
        max_new_tokens: At most so many tokens for each answer.
        limit: Only the first samples of each task.
        baselines: Beside each model, where data has the copies: the one answer that scores best
            (majority), and the model without the images (blind).
    """

    tasks: tuple[str, ...] = PAPER_TASKS
    data: str | None = None
    include: str | None = None
    python: str | None = None
    device: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    max_new_tokens: int = 16
    limit: int | None = None
    baselines: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        if not self.tasks:
            raise ValueError("tasks is empty; give at least one, e.g. tasks=mme,gqa")
        for task in self.tasks:
            if task in _TEXT_ONLY:
                raise ValueError(
                    f"tasks has {task!r}, some of whose questions have no image, on which "
                    "lmms-eval 0.7 fails; use scienceqa_img, which the paper's numbers are of"
                )
        if self.baselines and (self.data is None or self.limit is not None):
            raise ValueError("baselines needs local copies (data=FOLDER) and no limit")
        for name in ("max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, eq=False)
class TaskResult:
    """One task's result.

    Attributes:
        task: Its name.
        score: What the paper reports: a share of right answers in percent; for MME the sum of
            perception and cognition.
        highest: The most that the score can be.
        samples: (M,) contributions; their mean is ``score / highest``.
        metrics: All of the harness's own metrics.
        settings: Version, prompts and decoding.
        answers: (M,) what the model wrote.
    """

    task: str
    score: float
    highest: float
    samples: NDArray[np.float64]
    metrics: dict[str, float]
    settings: dict[str, Any]
    answers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give everything but the answers, which lie in the harness's logs."""
        return {
            "score": self.score,
            "highest": self.highest,
            "samples": len(self.samples),
            "metrics": self.metrics,
            "settings": self.settings,
        }


def evaluate_vlm(model: str, output: Path, arguments: EvaluateArguments) -> dict[str, TaskResult]:
    """Run lmms-eval on a LLaVA checkpoint; what is done is not done again.

    Args:
        model: Folder or hub id.
        output: Folder for logs and ``results.json``.
        arguments: Tasks and numbers.

    Returns:
        Task -> result.

    Raises:
        ValueError: If lmms-eval is not there, or the data.
        RuntimeError: If it gave no results, or failed on samples.
    """
    request = {"model": _identity(model), "arguments": asdict(replace(arguments, baselines=False))}
    request = json.loads(json.dumps(request))
    kept = read_json(output / "request.json")
    if kept != request:
        python = arguments.python or sys.executable
        if os.path.dirname(python):  # the harness runs in another folder; its link stays a link
            python = os.path.abspath(python)
        _check_harness(python)
        output.mkdir(parents=True, exist_ok=True)
        (output / "request.json").unlink(missing_ok=True)
        _run(python, model, output, arguments)
    results = read_results(output / "logs", arguments.tasks, output / "lmms-eval.log")
    write_json(
        output / "results.json",
        {"model": model, "tasks": {task: result.to_json() for task, result in results.items()}},
    )
    write_json(output / "request.json", request)
    return results


def _identity(model: str) -> str:
    """What changes when a local model does: its manifest, or its files' sizes and times."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hash_parts(repr(facts).encode())


def _check_harness(python: str) -> None:
    """Find out early whether the harness can be imported.

    Raises:
        ValueError: Says how to install it.
    """
    code = "import decord, importlib.metadata as m; print(m.version('lmms-eval'))"
    try:
        found = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=False, timeout=300
        )
    except OSError as error:
        raise ValueError(f"python is {python!r}, which cannot be run ({error.strerror})") from error
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"lmms-eval is not installed for {python} ({reason}): pip install '.[eval]' in the "
            "checkout, into an environment of its own, whose python you give as python=PATH"
        )
    logger.info("lmms-eval %s", found.stdout.strip())


def _run(python: str, model: str, output: Path, arguments: EvaluateArguments) -> None:
    """Start the harness and wait for it; everything that it says goes into ``lmms-eval.log``."""
    device = arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    source = str(Path(model).resolve()) if Path(model).exists() else model
    options = f"pretrained={source},device={device},device_map={device}"
    command = [
        *(python, "-m", "lmms_eval", "--model", "llava_hf"),
        *("--model_args", f"{options},dtype={arguments.precision}"),
        *("--tasks", ",".join(arguments.tasks), "--batch_size", "1"),
        *("--gen_kwargs", f"max_new_tokens={arguments.max_new_tokens}"),
        *("--output_path", str((output / "logs").resolve())),
    ]
    if arguments.include is not None:
        command += ["--include_path", str(Path(arguments.include).resolve())]
    if arguments.limit is not None:
        command += ["--limit", str(arguments.limit)]
    command.append("--log_samples")
    environment = dict(os.environ)
    place = None
    if arguments.data is not None:
        place = _local_copies(arguments.data)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        # The datasets library goes by names alone: other copies of one name would be the old ones.
        cache = output.resolve() / f"cache-{hash_parts(repr(facts).encode())[:16]}"
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(cache),
        }
    log = output / "lmms-eval.log"
    logger.info("evaluating %s on %s; log: %s", model, ", ".join(arguments.tasks), log)
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            command, cwd=place, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )


def _local_copies(folder: str) -> Path:
    place = Path(folder).resolve()
    if not place.is_dir():
        raise ValueError(
            f"data is {folder!r}, which is no folder; it should hold local copies such as "
            "lmms-lab-encoder/MME"
        )
    return place


def read_results(
    logs: Path, tasks: Sequence[str], log: Path | None = None
) -> dict[str, TaskResult]:
    """Read what the harness wrote, if it really ran.

    Args:
        logs: Its output folder.
        tasks: What must be there.
        log: What it said.

    Raises:
        RuntimeError: If results or samples are missing, or a sample was not answered.
    """
    said = log.read_text(encoding="utf-8", errors="replace") if log and log.is_file() else ""
    files = sorted(logs.rglob("*_results.json"))
    if not files:
        raise RuntimeError(f"lmms-eval wrote no results: {_last_error(said)}; see {log}")
    failed = re.findall(r"Error (.*) in generating", said)
    if failed:
        raise RuntimeError(
            f"lmms-eval failed on {len(failed)} samples and would count them as wrong: "
            f"{failed[0]}; see {log}"
        )
    content = json.loads(files[-1].read_text(encoding="utf-8"))
    prefix = files[-1].name.removesuffix("_results.json")
    results = {}
    for task in tasks:
        samples_file = files[-1].with_name(f"{prefix}_samples_{task}.jsonl")
        if task not in content["results"] or not samples_file.is_file():
            there = ", ".join(sorted(content["results"])) or "none"
            raise RuntimeError(f"lmms-eval has no results of {task}, only of {there}; see {log}")
        lines = samples_file.read_text(encoding="utf-8").splitlines()
        samples = sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))
        results[task] = _task_result(task, content, samples)
    return results


def _last_error(said: str) -> str:
    lines = [line for line in said.splitlines() if re.search(r"\w(Error|Exception)\b", line)]
    return lines[-1].strip() if lines else "it said nothing about why"


def _task_result(
    task: str, content: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> TaskResult:
    metrics = {
        name.removesuffix(",none"): float(value)
        for name, value in content["results"][task].items()
        if isinstance(value, int | float) and "stderr" not in name and name != "samples"
    }
    config = content["configs"][task]
    settings = {
        "version": content["versions"].get(task),
        "prompts": config.get("lmms_eval_specific_kwargs"),
        "decoding": config.get("generation_kwargs"),
        "data": [config.get("dataset_path"), config.get("dataset_name"), config.get("test_split")],
        "model_args": content["config"].get("model_args"),
        "gen_kwargs": content["config"].get("gen_kwargs"),
    }
    answers = tuple(str(_first(sample["filtered_resps"])) for sample in samples)
    if set(MME_METRICS) & set(samples[0]):
        facts = [next(s[name] for name in MME_METRICS if s.get(name)) for s in samples]
        values, highest = mme_contributions(facts)
        score = sum(metrics.get(name, 0.0) for name in MME_METRICS)
    else:
        values = np.array([float(sample["exact_match"]) for sample in samples])
        highest, score = 100.0, 100 * metrics["exact_match"]
    if abs(score - highest * values.mean()) > 1e-6 * highest:
        raise RuntimeError(
            f"lmms-eval reports {score:.4f} on {task}, but its samples make "
            f"{highest * values.mean():.4f}"
        )
    return TaskResult(task, score, highest, values, metrics, settings, answers)


def mme_contributions(
    facts: Sequence[Mapping[str, Any]],
) -> tuple[NDArray[np.float64], float]:
    """Spread MME's score over its questions, in pairs: accuracy and accuracy+ of each category.

    Args:
        facts: Of each of M questions its ``question_id``, ``category`` and ``score``.

    Returns:
        (M,) values with the mean ``score / highest``, and the highest score.
    """
    pairs: dict[tuple[str, str], list[float]] = {}
    for fact in facts:
        pairs.setdefault((fact["category"], fact["question_id"]), []).append(fact["score"])
    sizes = Counter(category for category, _ in pairs)
    values = []
    for fact in facts:
        category = fact["category"]
        both = pairs[category, fact["question_id"]]
        points = 100 * (sum(both) / len(both) + (sum(both) == len(both)))
        values.append(points / sizes[category] / len(both) * len(facts))
    highest = MME_CATEGORY * len(sizes)
    return np.array(values) / highest, highest


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
