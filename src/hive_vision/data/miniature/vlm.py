"""The miniature's conversations, and its benchmarks in the form of MME, GQA, OK-VQA and ScienceQA.

Made from the scenes that `build_miniature_data` wrote. Every answer depends on the picture, and the
answers of each form are balanced by what is asked: yes and no come in pairs, the others are drawn.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature

from hive_vision.data.miniature.questions import DIRECTIONS, describe, existence, is_towards
from hive_vision.data.miniature.scenes import COLOURS, DIGITS, SHAPES, TEXTURES, Thing, pick
from hive_vision.data.miniature.wording import TEXTURE_ADJECTIVES
from hive_vision.folders import write_json, written_aside

logger = logging.getLogger(__name__)

# What lmms-eval writes behind the questions of each benchmark (its task files, version 0.7).
BRIEFLY = "\nAnswer the question using a single word or phrase."
OR_UNANSWERABLE = (
    f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{BRIEFLY}"
)
LETTER = "\nAnswer with the option's letter from the given choices directly."
DESCRIBE = ("describe the picture.", "what do you see?", "write a caption.")

POSITIONS = (
    *("middle", "left", "right", "top", "bottom"),
    *("top left", "top right", "bottom left", "bottom right"),
)
ANNOTATORS = 10
_AGREEING = 7  # of the annotators, at least; the others say the same in other words
_CHOICES = (2, 3)  # of which one is right
_STREAMS = {"instructions": 11, "benchmarks": 12}
# Raised when the same settings come to mean other questions: scores on them cannot be compared.
VLM_FORMAT = 2
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Pair:
    """Two questions about one picture, to be answered with yes and with no (MME)."""

    category: str
    yes: str
    no: str


@dataclass(frozen=True)
class Choice:
    """A question with choices, one of which is right (ScienceQA)."""

    question: str
    hint: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """As lmms-eval writes it."""
        listed = "\n".join(
            f"{letter}. {text}" for letter, text in zip("ABCDE", self.choices, strict=False)
        )
        return f"Context: {self.hint}\n{self.question}\n{listed}{LETTER}"

    @property
    def letter(self) -> str:
        """The right one's."""
        return "ABCDE"[self.answer]


def ask_pairs(rng: np.random.Generator, things: Sequence[Thing]) -> list[Pair]:
    """Ask what is there, how many, where, and of which colour; a pair of each where it can be."""
    yes, no = existence(rng, things)
    pairs = [Pair("existence", yes.text, no.text)]
    others = [n for n in (1, 2, 3) if n != len(things)]
    other = others[int(rng.integers(len(others)))]
    pairs.append(Pair("count", _are_there(len(things)), _are_there(other)))
    thing = _singled_out(rng, things, "")
    if thing is not None:
        # "At the left" is not wrong of what is at the top left.
        its = set(thing.position.split())
        place = pick(rng, [p for p in POSITIONS if not its & set(p.split())])
        where = (f"is the {describe(thing)} {_at(p)}?" for p in (thing.position, place))
        pairs.append(Pair("position", *where))
    thing = _singled_out(rng, things, "colour")
    if thing is not None:
        colour = pick(rng, [c for c in COLOURS if c != thing.colour])
        words = describe(thing, leave_out="colour")
        pairs.append(Pair("color", *(f"is the {words} {c}?" for c in (thing.colour, colour))))
    return pairs


def ask_relation(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[str, str] | None:
    """Ask about what lies in some direction of an object; None where nothing does for certain.

    Returns:
        Question and answer: the colour of what lies there, or its kind.
    """
    named = Counter(describe(thing) for thing in things)
    found = []
    for thing in things:
        if named[describe(thing)] > 1:
            continue
        for direction, step in DIRECTIONS.items():
            judged = [(other, is_towards(other, thing, step)) for other in things if other != thing]
            towards = [other for other, there in judged if there]
            if len(towards) == 1 and all(there is not None for _, there in judged):
                place = f"the object {direction} the {describe(thing)}"
                found.append((f"what colour is {place}?", towards[0].colour))
                found.append((f"is {place} a shape or a digit?", towards[0].kind))
    return found[int(rng.integers(len(found)))] if found else None


def ask_open(
    rng: np.random.Generator, things: Sequence[Thing]
) -> tuple[str, str, tuple[str, ...]] | None:
    """Ask for a colour or a pattern, which people name in different words.

    Returns:
        Question, the usual answer, and what ten annotators answered.
    """
    form, thing = _asked_about(rng, things, ("colour", "texture"))
    if thing is None:
        return None
    words = describe(thing, leave_out=form)
    if form == "colour":
        return f"what colour is the {words}?", thing.colour, (thing.colour,) * ANNOTATORS
    assert thing.texture is not None
    usual, *others = TEXTURE_ADJECTIVES[thing.texture]
    agreeing = int(rng.integers(_AGREEING, ANNOTATORS + 1))
    answers = [usual] * agreeing + [pick(rng, others) for _ in range(ANNOTATORS - agreeing)]
    shuffled = tuple(answers[place] for place in rng.permutation(ANNOTATORS))
    return f"what pattern does the {words} have?", usual, shuffled


def ask_choice(rng: np.random.Generator, things: Sequence[Thing]) -> Choice | None:
    """Ask which colour or pattern an object has, or what it is, with choices and a hint."""
    form, thing = _asked_about(rng, things, ("colour", "texture", "name"))
    if thing is None:
        return None
    words = describe(thing, leave_out=form)
    options: Sequence[str]
    if form == "colour":
        right, options = thing.colour, tuple(COLOURS)
        question = f"which colour does the {words} have?"
    elif form == "texture":
        right, options = str(thing.texture), TEXTURES
        question = f"which pattern does the {words} have?"
    else:
        right, options = thing.name, SHAPES if thing.kind == "shape" else DIGITS
        question = f"which {'figure' if thing.kind == 'shape' else 'number'} is the {words}?"
    wrong = [option for option in options if option != right]
    choices = _CHOICES[int(rng.integers(len(_CHOICES)))]
    chosen = [wrong[place] for place in rng.permutation(len(wrong))[: choices - 1]]
    answer = int(rng.integers(choices))
    chosen.insert(answer, right)
    count = len(things)
    hint = f"the picture shows {count} object{'s' if count > 1 else ''}."
    return Choice(question, hint, tuple(chosen), answer)


def converse(
    rng: np.random.Generator, things: Sequence[Thing], caption: str
) -> list[tuple[str, str]]:
    """Ask for a caption and about a scene in all four forms, in a random order: prompts, answers.

    The caption is most of what is learned: one word says little about a picture (docs/log.md).
    """
    turns = [(pick(rng, DESCRIBE), caption)]
    for pair in ask_pairs(rng, things):
        is_yes = rng.random() < 0.5
        turns.append(((pair.yes if is_yes else pair.no) + BRIEFLY, "yes" if is_yes else "no"))
    relation = ask_relation(rng, things)
    if relation is not None:
        turns.append((relation[0] + BRIEFLY, relation[1]))
    asked = ask_open(rng, things)
    if asked is not None:
        turns.append((asked[0] + OR_UNANSWERABLE, asked[1]))
    for choice in (ask_choice(rng, things), ask_choice(rng, things)):  # the hardest to learn
        if choice is not None:
            turns.append((choice.prompt, choice.letter))
    return [turns[place] for place in rng.permutation(len(turns))]


def build_vlm_data(data: Path, folder: Path, questions: int, seed: int = 0) -> None:
    """Write conversations to learn from, and benchmarks.

    The layout under ``folder``:

    - ``settings.json``: what ``vlm_settings`` gives;
    - ``captions.json``: LLaVA's json about the images of ``captions/train`` (stage 1);
    - ``instructions/train-00000-of-00001.parquet``: as LLaVA-NeXT-Data (stage 2);
    - ``benchmarks/lmms-lab-encoder/{MME,GQA,OK-VQA,ScienceQA}``: columns, configurations and splits
      of the real ones, about scenes that nothing was learned from.

    Args:
        data: What ``build_miniature_data`` wrote.
        folder: The folder to make.
        questions: About so many in each benchmark.
        seed: Of what is asked.

    Raises:
        ValueError: If ``folder`` exists.
    """
    with written_aside(folder) as aside:
        write_json(aside / SETTINGS, vlm_settings(questions, seed))
        scenes = list(_scenes(data / "captions" / "train"))
        _write_captions(aside / "captions.json", scenes, seed)
        _write_instructions(aside / "instructions", data / "captions" / "train", scenes, seed)
        held_out = list(_scenes(data / "captions" / "validation"))
        root = aside / "benchmarks" / "lmms-lab-encoder"
        _write_benchmarks(root, data / "captions" / "validation", held_out, questions, seed)
    logger.info("wrote conversations and benchmarks to %s", folder)


def vlm_settings(questions: int, seed: int = 0) -> dict[str, int]:
    """Name what decides the questions: other settings, other questions."""
    return {"format": VLM_FORMAT, "questions": questions, "seed": seed}


def _scenes(folder: Path) -> Iterator[tuple[str, str, list[Thing]]]:
    """Read a split's scenes: file, caption, objects."""
    with (folder / "metadata.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            things = []
            for stored in record["objects"]:
                facts = {key: value for key, value in stored.items() if key != "words"}
                things.append(Thing(**{**facts, "box": tuple(facts["box"])}))
            yield record["file_name"], record["caption"], things


def _write_captions(path: Path, scenes: Sequence[Any], seed: int) -> None:
    rng = np.random.default_rng([seed, _STREAMS["instructions"], 0])
    samples = []
    for name, caption, _ in scenes:
        asked = f"<image>\n{pick(rng, DESCRIBE)}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": caption}]
        samples.append({"id": Path(name).stem, "image": name, "conversations": turns})
    path.write_text(json.dumps(samples), encoding="utf-8")


def _write_instructions(folder: Path, images: Path, scenes: Sequence[Any], seed: int) -> None:
    rng = np.random.default_rng([seed, _STREAMS["instructions"], 1])
    rows = []
    for name, caption, things in scenes:
        turns: list[dict[str, str]] = []
        for asked, answer in converse(rng, things, caption):
            mark = "<image>\n" if not turns else ""
            turns += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": answer}]
        rows.append(
            {
                "id": Path(name).stem,
                "conversations": turns,
                "data_source": "miniature",
                "image": _image(images, name),
            }
        )
    features = Features(
        {
            "id": Value("string"),
            "conversations": List({"from": Value("string"), "value": Value("string")}),
            "data_source": Value("string"),
            "image": ImageFeature(),
        }
    )
    folder.mkdir(parents=True)
    _write_parquet(folder / "train-00000-of-00001.parquet", rows, features)


def _write_benchmarks(
    root: Path, images: Path, scenes: Sequence[Any], questions: int, seed: int
) -> None:
    makers: dict[str, Callable[..., Any]] = {
        "MME": _mme,
        "GQA": _gqa,
        "OK-VQA": _ok_vqa,
        "ScienceQA": _science_qa,
    }
    for number, (name, make) in enumerate(makers.items()):
        rng = np.random.default_rng([seed, _STREAMS["benchmarks"], number])
        (root / name).mkdir(parents=True)
        configs = []
        for config, split, rows, features in make(rng, images, scenes, questions):
            file = f"{config}-{split}.parquet"
            _write_parquet(root / name / file, rows, Features(features))
            configs.append((config, split, file))
        _write_card(root / name, configs)


# Configuration, split, rows and columns of one table.
_Tables = Iterator[tuple[str, str, list[dict[str, Any]], dict[str, Any]]]


def _mme(rng: np.random.Generator, images: Path, scenes: Sequence[Any], questions: int) -> _Tables:
    rows: list[dict[str, Any]] = []
    for name, _, things in scenes:
        if len(rows) >= questions:
            break
        for pair in ask_pairs(rng, things):
            for text, answer in ((pair.yes, "Yes"), (pair.no, "No")):
                rows.append(
                    {
                        "question_id": f"{pair.category}/{name}",
                        "image": _image(images, name),
                        "question": f"{text} Please answer yes or no.",
                        "answer": answer,
                        "category": pair.category,
                    }
                )
    text = Value("string")
    columns = {"question_id": text, "image": ImageFeature(), "question": text, "answer": text}
    yield "default", "test", rows, {**columns, "category": text}


def _gqa(rng: np.random.Generator, images: Path, scenes: Sequence[Any], questions: int) -> _Tables:
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for name, _, things in scenes:
        asked = ask_relation(rng, things)
        if asked is None or len(rows) >= questions:
            continue
        image_id = Path(name).stem
        rows.append(
            {
                "id": f"{len(rows):08d}",
                "imageId": image_id,
                "question": asked[0],
                "answer": asked[1],
                "fullAnswer": asked[1],
                "isBalanced": True,
            }
        )
        shown.append({"id": image_id, "image": _image(images, name)})
    text = Value("string")
    columns = dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), text)
    yield "testdev_balanced_instructions", "testdev", rows, {**columns, "isBalanced": Value("bool")}
    yield "testdev_balanced_images", "testdev", shown, {"id": text, "image": ImageFeature()}


def _ok_vqa(
    rng: np.random.Generator, images: Path, scenes: Sequence[Any], questions: int
) -> _Tables:
    rows: list[dict[str, Any]] = []
    for name, _, things in scenes:
        asked = ask_open(rng, things)
        if asked is None or len(rows) >= questions:
            continue
        rows.append(
            {
                "question_id": str(len(rows)),
                "image": _image(images, name),
                "question": asked[0],
                "answers": list(asked[2]),
                "question_type": "other",
                "answer_type": "other",
            }
        )
    text = Value("string")
    columns = {"question_id": text, "image": ImageFeature(), "question": text}
    kinds = {"question_type": text, "answer_type": text}
    yield "default", "val2014", rows, {**columns, "answers": List(text), **kinds}


def _science_qa(
    rng: np.random.Generator, images: Path, scenes: Sequence[Any], questions: int
) -> _Tables:
    text = Value("string")
    empty = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    rows: list[dict[str, Any]] = []
    for name, _, things in scenes:
        asked = ask_choice(rng, things)
        if asked is None or len(rows) >= questions:
            continue
        rows.append(
            {
                "image": _image(images, name),
                "question": asked.question,
                "choices": list(asked.choices),
                "answer": asked.answer,
                "hint": asked.hint,
                **dict.fromkeys(empty, ""),
            }
        )
    columns = {"image": ImageFeature(), "question": text, "choices": List(text)}
    rest = {"answer": Value("int8"), "hint": text, **dict.fromkeys(empty, text)}
    yield "ScienceQA-IMG", "test", rows, {**columns, **rest}


def _write_card(folder: Path, configs: Sequence[tuple[str, str, str]]) -> None:
    """Write what the datasets library needs to find configurations and splits."""
    lines = ["---", "configs:"]
    for config, split, file in configs:
        lines += [
            f"- config_name: {config}",
            "  data_files:",
            f"  - split: {split}",
            f"    path: {file}",
        ]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _are_there(count: int) -> str:
    return "is there 1 object?" if count == 1 else f"are there {count} objects?"


def _at(position: str) -> str:
    return "in the middle" if position == "middle" else f"at the {position}"


def _singled_out(rng: np.random.Generator, things: Sequence[Thing], leave_out: str) -> Thing | None:
    """Choose an object that its other attributes single out."""
    named = Counter(describe(thing, leave_out=leave_out) for thing in things)
    unique = [thing for thing in things if named[describe(thing, leave_out=leave_out)] == 1]
    return unique[int(rng.integers(len(unique)))] if unique else None


def _asked_about(
    rng: np.random.Generator, things: Sequence[Thing], forms: Sequence[str]
) -> tuple[str, Thing | None]:
    """Choose an attribute, and an object that has it and is singled out by the others."""
    for place in rng.permutation(len(forms)):
        thing = _singled_out(rng, things, forms[place])
        if thing is not None and not (forms[place] == "texture" and thing.texture is None):
            return forms[place], thing
    return "", None


def _image(folder: Path, name: str) -> dict[str, Any]:
    return {"bytes": (folder / name).read_bytes(), "path": name}


def _write_parquet(path: Path, rows: list[dict[str, Any]], features: Features) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path)
