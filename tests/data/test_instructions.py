"""Conversations: the forms they come in, what is learned of them, and what cannot be used."""

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hive_vision.conversation import EncodedConversation, Turn
from hive_vision.data.instruction_sources import (
    Instructions,
    InstructionSource,
    open_instructions,
    split_off,
)
from hive_vision.data.instructions import InstructionDataset, read_turns

IMAGE_ID = 9


def encode(turns: list[Turn]) -> EncodedConversation:
    """One id a word, an answer's words are learned: 9 is an image, 2 the end of a turn."""
    ids: list[int] = []
    learned = []
    for turn in turns:
        start = len(ids)
        ids += [IMAGE_ID if w == "<image>" else 10 + len(w) for w in turn["content"].split()]
        ids.append(2)
        if turn["role"] == "assistant":
            learned.append((start, len(ids)))
    if not learned:
        return EncodedConversation(problem="no answer to learn from")
    return EncodedConversation(tuple(ids), tuple(learned))


def dataset(*sources: Instructions, image_tokens: int = 4, max_tokens: int = 100) -> Any:
    return InstructionDataset(
        sources,
        encode,
        "test",
        image_token_id=IMAGE_ID,
        image_tokens=image_tokens,
        max_tokens=max_tokens,
    )


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": side, "value": text} for side, text in pairs]


ASKED = said(("human", "<image>\nwhat is it"), ("gpt", "a square"))
SAMPLES = [
    {"id": "a", "image": "1.png", "conversations": ASKED},
    {"id": "b", "conversations": said(("human", "hello"), ("gpt", "hello you"))},
    {
        "id": "c",
        "image": ["2.png", "3.png"],
        "conversations": said(("human", "<image> and <image> differ"), ("gpt", "yes")),
    },
    {"id": "d", "image": None, "conversations": said(("human", "bye"), ("gpt", "bye"))},
]


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for value in (1, 2, 3):
        picture(value).save(tmp_path / "images" / f"{value}.png")
    (tmp_path / "chat.json").write_text(json.dumps(SAMPLES))
    return tmp_path / "chat.json"


def opened(llava: Path, **options: Any) -> Instructions:
    return open_instructions(InstructionSource(str(llava), str(llava.parent / "images"), **options))


def hub_form(embedded: bool = True) -> datasets.Dataset:
    """As LLaVA-NeXT-Data: an image or none."""
    rows = [ASKED, said(("human", "hello"), ("gpt", "hello you"))]
    images = [picture(7), None]
    columns = {
        "id": ["a", "b"],
        "conversations": rows,
        "data_source": ["x", "y"],
        "image": images if embedded else ["7.png", None],
    }
    return datasets.Dataset.from_dict(columns)


def shades(sample: Any) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in sample["images"]]


class TestForms:
    def test_llava_json(self, llava: Path) -> None:
        data = dataset(opened(llava))
        assert len(data) == 4
        assert [shades(data[row]) for row in range(4)] == [[1], [], [2, 3], []]
        assert data[0]["input_ids"] == [9, 14, 12, 12, 2, 11, 16, 2]
        assert data[0]["learned"] == [(5, 8)]
        assert data.lengths.tolist() == [11, 5, 13, 4]
        assert data.epoch_size == 4

    def test_images_beside_the_json(self, llava: Path) -> None:
        beside = llava.parent / "images" / "chat.json"
        llava.rename(beside)
        assert shades(dataset(open_instructions(InstructionSource(str(beside))))[2]) == [2, 3]

    @pytest.mark.parametrize("kind", ["parquet", "saved"])
    def test_the_form_of_llava_next_data(self, kind: str, tmp_path: Path) -> None:
        if kind == "saved":
            hub_form().save_to_disk(tmp_path / "next")
        else:
            (tmp_path / "next").mkdir()
            hub_form().to_parquet(tmp_path / "next" / "train-00000-of-00001.parquet")
        data = dataset(open_instructions(InstructionSource(str(tmp_path / "next"))))
        assert [shades(data[row]) for row in range(2)] == [[7], []]
        assert data[0]["input_ids"] == [9, 14, 12, 12, 2, 11, 16, 2]

    def test_several_images_embedded(self, tmp_path: Path) -> None:
        rows = [
            {"images": [picture(1), picture(2)], "messages": [
                {"role": "user", "content": "<image> <image> differ"},
                {"role": "assistant", "content": "yes"},
            ]},
            {"images": [], "messages": [
                {"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"},
            ]},
        ]  # fmt: skip
        features = datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List(
                    {"role": datasets.Value("string"), "content": datasets.Value("string")}
                ),
            }
        )
        datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "x")
        source = InstructionSource(
            str(tmp_path / "x"), image_column="images", conversation_column="messages"
        )
        data = dataset(open_instructions(source))
        assert [shades(data[row]) for row in range(2)] == [[1, 2], []]

    def test_text_only(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.json"
        path.write_text(json.dumps([SAMPLES[1], SAMPLES[3]]))
        data = dataset(open_instructions(InstructionSource(str(path))))
        assert [shades(data[row]) for row in range(2)] == [[], []]
        features = {"conversations": [SAMPLES[1]["conversations"]], "image": [None]}
        datasets.Dataset.from_dict(features).save_to_disk(tmp_path / "x")
        assert shades(dataset(open_instructions(InstructionSource(str(tmp_path / "x"))))[0]) == []

    def test_several_sources(self, llava: Path, tmp_path: Path) -> None:
        hub_form().save_to_disk(tmp_path / "x")
        data = dataset(opened(llava), open_instructions(InstructionSource(str(tmp_path / "x"))))
        assert len(data) == 6
        assert [shades(data[row]) for row in (2, 4, 5)] == [[2, 3], [7], []]
        assert [data[row]["sample_id"] for row in (2, 4)] == [2, 4]
        assert [part.size for part in data.parts] == [4, 2]

    def test_travels_to_a_worker(self, llava: Path) -> None:
        data = dataset(opened(llava))
        first = data[2]
        again = pickle.loads(pickle.dumps(data))[2]
        assert again["input_ids"] == first["input_ids"]
        assert shades(again) == shades(first)


class TestSelection:
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    def test_selected_conversations_keep_their_images(
        self, llava_data: Instructions, rows: list[int]
    ) -> None:
        data = dataset(llava_data.select(np.array(rows)))
        images = {0: [1], 1: [], 2: [2, 3], 3: []}
        assert [shades(data[place]) for place in range(len(rows))] == [images[r] for r in rows]

    @pytest.fixture(scope="class")
    def llava_data(self, tmp_path_factory: pytest.TempPathFactory) -> Instructions:
        folder = tmp_path_factory.mktemp("llava")
        for value in (1, 2, 3):
            picture(value).save(folder / f"{value}.png")
        (folder / "chat.json").write_text(json.dumps(SAMPLES))
        return open_instructions(InstructionSource(str(folder / "chat.json")))

    def test_held_out(self, llava_data: Instructions) -> None:
        rest, held_out = split_off(llava_data, 0.5, least=1)
        assert (len(rest), len(held_out)) == (2, 2)
        both = [*rest.conversations["turns"], *held_out.conversations["turns"]]
        assert sorted(map(str, both)) == sorted(map(str, llava_data.conversations["turns"]))
        again = split_off(llava_data, 0.5, least=1)
        assert again[1].fingerprint == held_out.fingerprint != rest.fingerprint
        with pytest.raises(ValueError, match="has 4 conversations, of which 4 would be held out"):
            split_off(llava_data, 1.0, least=1)

    def test_fingerprint(self, llava: Path) -> None:
        before = opened(llava).fingerprint
        assert opened(llava).fingerprint == before
        changed = json.loads(llava.read_text())
        changed[1]["conversations"][1]["value"] = "hello me!"
        llava.write_text(json.dumps(changed))
        assert opened(llava).fingerprint != before


class TestTurns:
    def test_one_image_goes_to_the_front_of_its_turn(self) -> None:
        stored = said(("human", "what is\n<image>"), ("gpt", " a square "))
        assert read_turns(stored, 1) == [
            {"role": "user", "content": "<image>\nwhat is"},
            {"role": "assistant", "content": "a square"},
        ]

    def test_images_that_the_text_forgot(self) -> None:
        stored = said(("system", "be brief"), ("human", "what"), ("gpt", "a square"))
        assert read_turns(stored, 2)[1]["content"] == "<image>\n<image>\nwhat"

    def test_what_is_said_unasked_is_left_out(self) -> None:
        stored = said(("gpt", "hello"), ("human", "what"), ("gpt", "a square"))
        assert [turn["role"] for turn in read_turns(stored, 0)] == ["user", "assistant"]

    @pytest.mark.parametrize(
        ("stored", "images", "message"),
        [
            (said(("human", "<image> <image>"), ("gpt", "a")), 1, "2 <image> in the text but 1"),
            (said(("human", "<image> what"), ("gpt", "a")), 0, "1 <image> in the text but 0"),
            (said(("bot", "a")), 0, "role 'bot' is none of human, gpt"),
            (said(("human", "what"), ("gpt", "<image>")), 1, "an answer has an image"),
        ],
    )
    def test_what_does_not_fit(self, stored: Any, images: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_turns(stored, images)

    def test_nothing_said(self) -> None:
        assert read_turns(None, 0) == []


class TestCutting:
    def test_never_inside_an_image(self, llava: Path) -> None:
        """Row 2 is <image> and <image> differ, end; yes, end: images of 4 tokens each."""
        whole = dataset(opened(llava))
        for limit in range(1, 20):
            data = dataset(opened(llava), max_tokens=limit)
            ids = data._token_ids[0][0][2].as_py()
            kept = [4 if token == IMAGE_ID else 1 for token in ids]
            assert sum(kept) <= limit
            assert ids == whole[2]["input_ids"][: len(ids)]
            assert data.lengths[2] == sum(kept)
            fits = sum(kept) == whole.lengths[2]
            assert fits or sum(kept) + (4 if whole[2]["input_ids"][len(ids)] == 9 else 1) > limit

    def test_is_counted_and_learned_as_far_as_it_goes(self, llava: Path) -> None:
        data = dataset(opened(llava), max_tokens=10)
        assert data.cut == 2
        assert data[0]["learned"] == [(5, 7)], "the end of the turn is cut off"
        assert data.problems == {2: "no answer within 10 tokens"}

    def test_images_behind_the_cut_are_not_read(self, tmp_path: Path) -> None:
        picture(1).save(tmp_path / "1.png")
        conversation = said(
            ("human", "<image>\none"), ("gpt", "a square"), ("human", "<image> two"), ("gpt", "b")
        )
        sample = {"image": ["1.png", "missing.png"], "conversations": conversation}
        (tmp_path / "chat.json").write_text(json.dumps([sample]))
        source = open_instructions(InstructionSource(str(tmp_path / "chat.json")))
        assert shades(dataset(source, max_tokens=10)[0]) == [1]


class TestBadSamples:
    def test_unreadable_images_and_nothing_to_learn(self, llava: Path) -> None:
        samples = [
            *SAMPLES,
            {"image": "gone.png", "conversations": ASKED},
            {"conversations": said(("human", "only asked"))},
            {"image": "1.png", "conversations": said(("human", "<image> <image>"), ("gpt", "a"))},
        ]
        llava.write_text(json.dumps(samples))
        data = dataset(opened(llava))
        assert data.problems == {
            5: "no answer to learn from",
            6: "2 <image> in the text but 1 images",
        }
        for row, reason in ((4, "FileNotFoundError"), (5, "no answer"), (6, "2 <image>")):
            sample = data[row]
            (bad, *_) = sample["bad_samples"]
            assert bad.sample_id == row
            assert bad.reason.startswith(reason)
            assert bad.source == f"{llava} row {row}"
            assert bad.replaced_by == sample["sample_id"] != row

    def test_others_images(self, llava: Path) -> None:
        data = dataset(opened(llava))
        assert shades(data.with_images_of(2, 0)) == [1, 1]
        assert shades(data.with_images_of(0, 2)) == [2]
        assert shades(data.with_images_of(0, 1)) == [1], "that one has none"
        assert shades(data.with_images_of(1, 0)) == []
