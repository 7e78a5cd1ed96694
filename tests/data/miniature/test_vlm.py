"""The miniature's conversations and benchmarks: answers that the scene gives, in the real forms."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from hive_vision.data.instruction_sources import InstructionSource, open_instructions
from hive_vision.data.instructions import read_turns
from hive_vision.data.miniature.questions import DIRECTIONS, describe, is_towards
from hive_vision.data.miniature.vlm import (
    BRIEFLY,
    DESCRIBE,
    LETTER,
    OR_UNANSWERABLE,
    ask_choice,
    ask_open,
    ask_pairs,
    ask_relation,
    build_vlm_data,
    converse,
)
from hive_vision.data.miniature.wording import TEXTURE_ADJECTIVES
from tests.data.miniature.test_questions import scenes

SCENES = list(scenes(60))


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def those(things: Any, words: str, leave_out: str = "") -> list[Any]:
    return [thing for thing in things if describe(thing, leave_out=leave_out) == words]


def holds(question: str, things: Any) -> bool:
    """Whether a yes-no question is to be answered with yes, read as a person would."""
    if found := re.fullmatch(r"(?:is|are) there (\d) objects?\?", question):
        return len(things) == int(found[1])
    if found := re.fullmatch(r"is the (.+?) (?:at the|in the) (.+)\?", question):
        (thing,) = those(things, found[1])
        return thing.position == found[2]
    if found := re.fullmatch(r"is there (?:a|the digit) (\w+)\?", question):
        return any(thing.name == found[1] for thing in things)
    if found := re.fullmatch(r"is there any (\w+) (shape|digit)\?", question):
        word, kind = found.groups()
        return any(t.kind == kind and word in (t.colour, t.texture) for t in things)
    found = re.fullmatch(r"is the (.+) (\w+)\?", question)
    assert found, question
    (thing,) = those(things, found[1], leave_out="colour")
    return thing.colour == found[2]


class TestQuestions:
    def test_pairs_are_yes_and_no(self) -> None:
        categories = set()
        for seed, things in enumerate(SCENES):
            for pair in ask_pairs(random(seed), things):
                categories.add(pair.category)
                assert holds(pair.yes, things), pair.yes
                assert not holds(pair.no, things), pair.no
                if pair.category == "position":
                    words = [re.split(" at the | in the ", q)[-1][:-1] for q in (pair.yes, pair.no)]
                    assert not set(words[0].split()) & set(words[1].split())
        assert categories == {"existence", "count", "position", "color"}  # MME's names

    def test_relations(self) -> None:
        asked, forms = 0, set()
        for seed, things in enumerate(SCENES):
            found = ask_relation(random(seed), things)
            if found is None:
                continue
            asked += 1
            match = re.fullmatch(
                r"(?:what colour )?is the object (.+) the (.+?)( a shape or a digit)?\?", found[0]
            )
            assert match
            direction, words, of_kind = match.groups()
            (thing,) = those(things, words)
            sides = {t: is_towards(t, thing, DIRECTIONS[direction]) for t in things if t != thing}
            assert None not in sides.values(), "what overlaps is neither there nor not there"
            there = [t for t, is_there in sides.items() if is_there]
            assert [t.kind if of_kind else t.colour for t in there] == [found[1]]
            forms.add(of_kind)
        assert len(forms) == 2
        assert asked > 15
        assert ask_relation(random(0), SCENES[0]) is None, "one object lies nowhere"

    def test_open_answers_of_ten(self) -> None:
        for seed, things in enumerate(SCENES):
            found = ask_open(random(seed), things)
            if found is None:
                continue
            question, usual, answers = found
            assert len(answers) == 10
            assert answers.count(usual) >= 7
            words = re.fullmatch(r"what (?:colour is|pattern does) the (.+?)(?: have)?\?", question)
            assert words
            if "pattern" in question:
                (thing,) = those(things, words[1], leave_out="texture")
                assert set(answers) <= set(TEXTURE_ADJECTIVES[thing.texture])
                assert usual == TEXTURE_ADJECTIVES[thing.texture][0]
            else:
                (thing,) = those(things, words[1], leave_out="colour")
                assert set(answers) == {thing.colour}

    def test_choices(self) -> None:
        letters, forms = set(), set()
        for seed, things in enumerate(SCENES):
            choice = ask_choice(random(seed), things)
            if choice is None:
                continue
            letters.add(choice.letter)
            assert len(set(choice.choices)) in (2, 3)
            right = choice.choices[choice.answer]
            match = re.fullmatch(r"which (\w+) (?:does|is) the (.+?)(?: have)?\?", choice.question)
            assert match
            form = {"colour": "colour", "pattern": "texture"}.get(match[1], "name")
            forms.add(form)
            (thing,) = those(things, match[2], leave_out=form)
            assert right == getattr(thing, form)
            assert choice.hint.startswith(f"the picture shows {len(things)} object")
            assert choice.prompt.splitlines()[2] == f"A. {choice.choices[0]}"
        assert letters == set("ABC")
        assert forms == {"colour", "texture", "name"}

    def test_conversations_have_all_forms(self) -> None:
        endings: dict[str, int] = {}
        places = set()
        for seed, things in enumerate(SCENES):
            turns = converse(random(seed), things, "a caption")
            described = [answer for asked, answer in turns if asked in DESCRIBE]
            assert described == ["a caption"]
            places.add([answer for _, answer in turns].index("a caption"))
            for asked, answer in turns:
                if asked in DESCRIBE:
                    continue
                ending = next(e for e in (OR_UNANSWERABLE, LETTER, BRIEFLY) if asked.endswith(e))
                endings[ending] = endings.get(ending, 0) + 1
                assert answer
        assert min(endings.values()) > 20
        assert len(places) > 3, "what is asked first must not always be the caption"


@pytest.fixture(scope="module")
def built(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "vlm"
    build_vlm_data(miniature, folder, questions=30)
    return folder


class TestFiles:
    def test_captions_are_llavas(self, built: Path, miniature: Path) -> None:
        source = InstructionSource(
            str(built / "captions.json"), str(miniature / "captions" / "train")
        )
        data = open_instructions(source)
        assert len(data) == 240
        first = read_turns(data.stored_turns(0), 1)
        lines = (miniature / "captions" / "train" / "metadata.jsonl").read_text().splitlines()
        assert first[1]["content"] == json.loads(lines[0])["caption"].strip()
        assert first[0]["content"].startswith("<image>\n")
        assert data.images.read(0)["path"].endswith("000000.png")

    def test_instructions_are_llava_nexts(self, built: Path) -> None:
        data = open_instructions(InstructionSource(str(built / "instructions")))
        assert len(data) == 240
        for row in range(240):
            assert read_turns(data.stored_turns(row), 1)[0]["content"].startswith("<image>")

    @pytest.mark.parametrize(
        ("name", "config", "split", "columns"),
        [
            ("MME", None, "test", {"question_id", "image", "question", "answer", "category"}),
            (
                "GQA",
                "testdev_balanced_instructions",
                "testdev",
                {"id", "imageId", "question", "answer"},
            ),
            ("GQA", "testdev_balanced_images", "testdev", {"id", "image"}),
            ("OK-VQA", None, "val2014", {"question_id", "image", "question", "answers"}),
            (
                "ScienceQA",
                "ScienceQA-IMG",
                "test",
                {"image", "question", "choices", "answer", "hint", "lecture", "solution"},
            ),
        ],
    )
    def test_benchmarks_load_as_the_real_ones(
        self,
        name: str,
        config: str | None,
        split: str,
        columns: set[str],
        built: Path,
        tmp_path: Path,
    ) -> None:
        folder = str(built / "benchmarks" / "lmms-lab-encoder" / name)
        data = datasets.load_dataset(folder, config, split=split, cache_dir=str(tmp_path))
        assert columns <= set(data.column_names)
        assert 20 <= len(data) <= 40
        if "image" in data.column_names:
            assert data[0]["image"].size == (48, 48)

    def test_mme_has_two_questions_each(self, built: Path) -> None:
        table = pq.read_table(built / "benchmarks/lmms-lab-encoder/MME/default-test.parquet")
        rows = table.select(["question_id", "category", "answer", "question"]).to_pylist()
        pairs: dict[str, list[str]] = {}
        for row in rows:
            pairs.setdefault(row["question_id"], []).append(row["answer"])
            assert row["question"].endswith(" Please answer yes or no.")
        assert all(sorted(answers) == ["No", "Yes"] for answers in pairs.values())

    def test_every_image_of_gqa_is_there(self, built: Path) -> None:
        folder = built / "benchmarks" / "lmms-lab-encoder" / "GQA"
        asked = pq.read_table(folder / "testdev_balanced_instructions-testdev.parquet")
        shown = pq.read_table(folder / "testdev_balanced_images-testdev.parquet")
        assert set(asked["imageId"].to_pylist()) == set(shown["id"].to_pylist())

    def test_same_seed_same_bytes(self, built: Path, miniature: Path, tmp_path: Path) -> None:
        build_vlm_data(miniature, tmp_path / "again", questions=30)
        files = [path for path in built.rglob("*") if path.is_file()]
        assert len(files) == 12
        for path in files:
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(built)).read_bytes()
        build_vlm_data(miniature, tmp_path / "other", questions=30, seed=1)
        name = "instructions/train-00000-of-00001.parquet"
        assert (built / name).read_bytes() != (tmp_path / "other" / name).read_bytes()

    def test_is_not_overwritten(self, built: Path, miniature: Path) -> None:
        with pytest.raises(ValueError, match="exists already"):
            build_vlm_data(miniature, built, questions=30)
