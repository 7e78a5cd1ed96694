"""What a VLM's scores must beat: one answer to everything, and the same model without the image.

Both work on local copies of MME, GQA, OK-VQA and ScienceQA, the miniature's or the real ones.
"""

import io
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from hive_vision.evaluation.vlm_benchmarks import TaskResult, mme_contributions
from hive_vision.folders import written_aside

MAJORITY = "majority"
GREY = (128, 128, 128)
_ENOUGH = 3  # of the other annotators who gave an answer, for it to be all right (VQA accuracy)

# Task -> folder of its copy, and what the names of its files with questions contain.
COPIES = {
    "mme": ("lmms-lab-encoder/MME", ""),
    "gqa": ("lmms-lab-encoder/GQA", "instructions"),
    "ok_vqa_val2014": ("lmms-lab-encoder/OK-VQA", ""),
    "scienceqa_img": ("lmms-lab-encoder/ScienceQA", "IMG"),
}


def blind(method: str) -> str:
    """Name a method's results without images."""
    return f"blind {method}"


def is_a_question(first: str, second: str, methods: Collection[str]) -> bool:
    """Whether anyone asks what the first has more than the second: baselines are to be beaten.

    Args:
        first: A method or baseline.
        second: Another one.
        methods: Methods and baselines that are there.
    """
    baselines = {MAJORITY, *(blind(method) for method in methods)}
    return first not in baselines and (
        second not in baselines or second in (MAJORITY, blind(first))
    )


def majority_answers(data: Path, tasks: Sequence[str]) -> dict[str, TaskResult]:
    """Score the one answer to everything that scores best.

    Args:
        data: Folder with local copies.
        tasks: Names of tasks; those without a copy are left out.

    Returns:
        Task -> result.
    """
    scorers: dict[str, Callable[[list[dict[str, Any]]], tuple[str, NDArray[np.float64], float]]] = {
        "mme": _mme,
        "gqa": _gqa,
        "ok_vqa_val2014": _ok_vqa,
        "scienceqa_img": _science_qa,
    }
    results = {}
    for task in tasks:
        if task not in COPIES:
            continue
        rows = [row for file in _files(data, task) for row in _rows(file)]
        if rows:
            answer, values, highest = scorers[task](rows)
            results[task] = TaskResult(
                task,
                float(highest * values.mean()),
                highest,
                values,
                {},
                {"answer": answer},
                (answer,) * len(rows),
            )
    return results


def blind_copies(data: Path, folder: Path) -> Path:
    """Copy benchmarks with every image replaced by grey of the same size; once.

    Args:
        data: Folder with local copies.
        folder: Where to write.

    Returns:
        The folder.
    """
    if folder.is_dir():
        return folder
    with written_aside(folder) as aside:
        for path in sorted(data.rglob("*")):
            target = aside / path.relative_to(data)
            if path.suffix == ".parquet":
                target.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(_without_images(pq.read_table(path)), target)
            elif path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return folder


def _files(data: Path, task: str) -> Iterator[Path]:
    place, part = COPIES[task]
    for path in sorted((data / place).rglob("*.parquet")):
        if part in path.relative_to(data / place).as_posix():
            yield path


def _rows(path: Path) -> list[dict[str, Any]]:
    names = [name for name in pq.read_schema(path).names if name != "image"]
    rows: list[dict[str, Any]] = pq.read_table(path, columns=names).to_pylist()
    return rows


def _mme(rows: list[dict[str, Any]]) -> tuple[str, NDArray[np.float64], float]:
    """Score yes: no scores the same, pairs being what they are."""
    facts = [
        {
            "question_id": row["question_id"],
            "category": row["category"],
            "score": float(row["answer"].lower() == "yes"),
        }
        for row in rows
    ]
    values, highest = mme_contributions(facts)
    return "yes", values, highest


def _gqa(rows: list[dict[str, Any]]) -> tuple[str, NDArray[np.float64], float]:
    return _most_common([row["answer"].lower() for row in rows])


def _science_qa(rows: list[dict[str, Any]]) -> tuple[str, NDArray[np.float64], float]:
    return _most_common([chr(ord("A") + row["answer"]) for row in rows])


def _most_common(answers: list[str]) -> tuple[str, NDArray[np.float64], float]:
    answer = Counter(answers).most_common(1)[0][0]
    return answer, np.array([float(right == answer) for right in answers]), 100.0


def _ok_vqa(rows: list[dict[str, Any]]) -> tuple[str, NDArray[np.float64], float]:
    """Score by VQA accuracy: of each annotator, whether three others gave the answer."""
    candidates = Counter(answer for row in rows for answer in row["answers"])

    def accuracies(answer: str) -> NDArray[np.float64]:
        return np.array([_vqa_accuracy(answer, row["answers"]) for row in rows])

    best = max(candidates, key=lambda answer: float(accuracies(answer).mean()))
    return best, accuracies(best), 100.0


def _vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    said = sum(other == answer for other in given)
    shares = [min(1.0, (said - (other == answer)) / _ENOUGH) for other in given]
    return float(np.mean(shares))


def _without_images(table: pa.Table) -> pa.Table:
    if "image" not in table.column_names:
        return table
    column = table.column_names.index("image")
    images = [
        None if stored is None else {**stored, "bytes": _grey(stored["bytes"])}
        for stored in table.column("image").to_pylist()
    ]
    field = table.schema.field("image")
    replaced = table.set_column(column, field, pa.array(images, field.type))
    return replaced.replace_schema_metadata(table.schema.metadata)


def _grey(content: bytes) -> bytes:
    size = Image.open(io.BytesIO(content)).size
    buffer = io.BytesIO()
    Image.new("RGB", size, GREY).save(buffer, format="PNG")
    return buffer.getvalue()
