"""lmms-eval on an export, with no file edited by hand, against transformers' own calls."""

import io
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hive_vision.data.miniature import MiniatureData, build_miniature_data, build_vlm_data
from hive_vision.evaluation.vlm_baselines import blind_copies, majority_answers
from hive_vision.evaluation.vlm_benchmarks import PAPER_TASKS, EvaluateArguments, evaluate_vlm
from hive_vision.training.arguments import (
    FinetuneArguments,
    FinetuneData,
    InstructionArguments,
    StageArguments,
    VlmArguments,
)
from hive_vision.training.finetune import finetune

BRIEFLY = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + BRIEFLY
)
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    sizes = MiniatureData(
        train_scenes=4, validation_scenes=40, classification_train=16, classification_test=16
    )
    build_miniature_data(folder / "data", sizes)
    build_vlm_data(folder / "data", folder / "vlm", questions=16)
    return folder / "vlm" / "benchmarks"


def rows(copies: Path, pattern: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(
        next((copies / "lmms-lab-encoder").glob(pattern))
    ).to_pylist()
    return found


@pytest.fixture(scope="module")
def asked(copies: Path) -> dict[str, list[tuple[dict[str, Any], str, str]]]:
    """Of each task every image, prompt as the task writes it, and right answer."""
    images = {row["id"]: row["image"] for row in rows(copies, "GQA/*images*")}
    mme, gqa = rows(copies, "MME/*.parquet"), rows(copies, "GQA/*instructions*")
    okvqa, science = rows(copies, "OK-VQA/*.parquet"), rows(copies, "ScienceQA/*.parquet")
    return {
        "mme": [
            (r["image"], _without_request(r["question"]) + BRIEFLY, r["answer"].lower())
            for r in mme
        ],
        "gqa": [(images[r["imageId"]], r["question"] + BRIEFLY, r["answer"]) for r in gqa],
        "ok_vqa_val2014": [
            (r["image"], r["question"] + UNANSWERABLE, max(r["answers"], key=r["answers"].count))
            for r in okvqa
        ],
        "scienceqa_img": [(r["image"], _with_choices(r), "ABCD"[r["answer"]]) for r in science],
    }


def _without_request(question: str) -> str:
    return question.replace(" Please answer yes or no.", "")


def _with_choices(row: dict[str, Any]) -> str:
    choices = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=False)]
    return "\n".join([f"Context: {row['hint']}", row["question"], *choices]) + LETTER


@pytest.fixture(scope="module")
def model(
    asked: dict[str, list[Any]],
    backbone_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Taught half of the questions, so that it is right on some and wrong on others."""
    folder = tmp_path_factory.mktemp("vlm")
    samples = [
        {
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{prompt}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for questions in asked.values()
        for image, prompt, answer in questions[::2]
    ]
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features({"image": ImageFeature(), "conversations": List(turn)})
    (folder / "data").mkdir()
    Dataset.from_list(samples, features=features).to_parquet(folder / "data" / "train.parquet")
    data = InstructionArguments(str(folder / "data"), validation=str(folder / "data"))
    everything = {"projectors": 3e-3, "language_model": 3e-3, "vision_model": "frozen"}
    arguments = FinetuneArguments(
        output=str(folder / "run"),
        model=VlmArguments(
            str(backbone_folders["siglip"]), str(backbone_folders["llama"]), chat_template="llava"
        ),
        data=FinetuneData(data, data),
        stage1=StageArguments(rules=everything, max_steps=0),
        stage2=StageArguments(rules=everything, max_steps=300, batch_size=16),
    )
    return Path(finetune(arguments)["model"])


@pytest.fixture(scope="module")
def results(model: Path, copies: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("evaluation")
    return evaluate_vlm(str(model), output, EvaluateArguments(data=str(copies), device="cpu"))


def answers_of_transformers(model: Path, questions: list[Any]) -> list[str]:
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    written = []
    for image, prompt, _ in questions:
        text = f"USER: <image>\n{prompt} ASSISTANT:"
        picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
        inputs = processor(images=picture, text=text, return_tensors="pt")
        with torch.no_grad():
            tokens = loaded.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        written.append(processor.decode(answer, skip_special_tokens=True))
    return written


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_answers_are_those_of_transformers(
    task: str, results: dict[str, Any], model: Path, asked: dict[str, list[Any]]
) -> None:
    expected = answers_of_transformers(model, asked[task])
    found = [answer.strip() for answer in results[task].answers]
    assert found == [answer.strip() for answer in expected]


def test_scores_are_those_of_the_answers(
    results: dict[str, Any], asked: dict[str, list[Any]], copies: Path
) -> None:
    """Counted again from the rules of each benchmark."""
    assert len({answer for task in PAPER_TASKS for answer in results[task].answers}) > 4
    right = {
        task: [
            said.strip().lower() == answer.lower()
            for said, (_, _, answer) in zip(results[task].answers, asked[task], strict=True)
        ]
        for task in PAPER_TASKS
    }
    for task in ("gqa", "scienceqa_img"):
        assert results[task].score == pytest.approx(100 * sum(right[task]) / len(right[task]))
        assert results[task].score > 0
    pairs: dict[str, list[bool]] = {}
    for row, correct in zip(rows(copies, "MME/*.parquet"), right["mme"], strict=True):
        pairs.setdefault(row["question_id"], []).append(correct)
    total = 0.0
    for category in ("existence", "count", "position", "color"):
        own = [both for name, both in pairs.items() if name.startswith(f"{category}/")]
        total += sum(50 * sum(both) + 100 * all(both) for both in own) / len(own)
    assert results["mme"].score == pytest.approx(total)
    accuracies = []
    okvqa = rows(copies, "OK-VQA/*.parquet")
    for row, said in zip(okvqa, results["ok_vqa_val2014"].answers, strict=True):
        given = [re.sub(r"[^\w ]", "", answer) for answer in row["answers"]]
        others = [given[:place] + given[place + 1 :] for place in range(10)]
        accuracies.append(sum(min(1, o.count(said.strip()) / 3) for o in others) / 10)
    assert results["ok_vqa_val2014"].score == pytest.approx(100 * sum(accuracies) / len(accuracies))


def test_settings_and_logs_are_kept(results: dict[str, Any]) -> None:
    for task in PAPER_TASKS:
        settings = results[task].settings
        assert settings["prompts"]["default"]["post_prompt"]
        assert settings["data"][0].startswith("lmms-lab-encoder/")
        assert settings["gen_kwargs"] == {"max_new_tokens": 16}


def test_baselines(model: Path, copies: Path, results: dict[str, Any], tmp_path: Path) -> None:
    """A blind model gives one answer to the same words; the majority's score is the harness's."""
    blind = blind_copies(copies, tmp_path / "blind")
    tasks = ("gqa", "scienceqa_img")
    settings = EvaluateArguments(tasks=tasks, data=str(blind), device="cpu")
    found = evaluate_vlm(str(model), tmp_path / "out", settings)
    assert list(found) == list(tasks)
    assert set(majority_answers(copies, PAPER_TASKS)) == set(PAPER_TASKS)
