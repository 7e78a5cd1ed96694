"""Settings: a file with overrides on top, and what a mistake in them says."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hive_vision.settings import check_keys, read_settings, settings_parser


@dataclass(frozen=True)
class Item:
    """One of several.

    Args:
        name: What it is called.
        weight: How often it is taken.
    """

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Part:
    """A part of the settings.

    Args:
        size: How large.
        rates: Any number of them.
        betas: Two of them.
    """

    size: int = 3
    rates: tuple[float, ...] = (0.1, 1.0)
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Whole:
    """Every kind of value.

    Args:
        title: A text.
        part: Settings of their own.
        spare: The same or nothing.
        items: One, several, or the name of one.
        seeds: Numbers.
        layer: A word or a number.
        rules: Numbers by name.
        verbose: Yes or no.
        texts: Several texts.
    """

    title: str = "none"
    part: Part = field(default_factory=Part)
    spare: Part | None = None
    items: str | Item | list[Item] = "none"
    seeds: tuple[int, ...] = (0, 1, 2)
    layer: Literal["last", "penultimate"] | int = "last"
    rules: dict[str, float] = field(default_factory=dict)
    verbose: bool = False
    texts: list[str] = field(default_factory=list)


@dataclass
class Strict:
    """Something has to be given.

    Args:
        item: An item.
        count: A number.
    """

    item: Item
    count: int


def read(*overrides: str, text: str | None = None, folder: Path | None = None) -> Whole:
    if text is None:
        return read_settings(Whole, overrides)
    assert folder is not None
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return read_settings(Whole, overrides, folder / "mine.yaml", "probe")


def message(*overrides: str, kind: type = Whole, path: Path | None = None) -> str:
    with pytest.raises(ValueError) as failure:  # noqa: PT011  returned
        read_settings(kind, overrides, path, "probe")
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


class TestValues:
    def test_defaults(self) -> None:
        assert read() == Whole()

    def test_over_file_over_default(self, tmp_path: Path) -> None:
        text = "part: {size: 4, rates: [7]}\nseeds: [5]\n"
        found = read("part.size=9", "seeds=[6,7]", text=text, folder=tmp_path)
        assert found == Whole(part=Part(size=9, rates=(7.0,)), seeds=(6, 7))

    def test_the_last_one_holds(self) -> None:
        assert read("title=a", "layer=2", "title=b").title == "b"

    def test_dashes_in_front_are_allowed(self) -> None:
        assert read("--part.size=5").part.size == 5

    @pytest.mark.parametrize("text", ["runs/my run", "runs/a=b", "123", "runs/ä", "a: b", "[x]"])
    def test_text_stays_text(self, text: str) -> None:
        assert read(f"title={text}").title == text

    def test_tuples_of_any_length(self) -> None:
        found = read("part.rates=[1,2,3]", "seeds=[]", "part.betas=[0.5,0.6]")
        assert found.part == Part(rates=(1.0, 2.0, 3.0), betas=(0.5, 0.6))
        assert found.seeds == ()
        assert [type(rate) for rate in found.part.rates] == [float] * 3

    @pytest.mark.parametrize("given", ["1,2", "[1,2]", "[1, 2]"])
    def test_lists_as_one_types_them(self, given: str) -> None:
        assert read(f"seeds={given}", f"part.rates={given}").seeds == (1, 2)
        assert read(f"part.rates={given}").part.rates == (1.0, 2.0)
        assert read("seeds=7").seeds == (7,)
        assert read("texts=a photo of a {}.,the {}").texts == ["a photo of a {}.", "the {}"]
        assert read("title=a,b").title == "a,b"
        assert read("items=a,b").items == "a,b"

    @pytest.mark.parametrize(("given", "expected"), [("3", 3), ("penultimate", "penultimate")])
    def test_a_word_or_a_number(self, given: str, expected: Any) -> None:
        assert read(f"layer={given}").layer == expected

    @pytest.mark.parametrize("rate", ["1e-3", "1.0e-3", "0.001"])
    def test_numbers_however_they_are_written(self, rate: str, tmp_path: Path) -> None:
        # YAML itself reads 1e-3 as text.
        found = read(text=f"part: {{rates: [{rate}]}}\nrules: {{a: {rate}}}", folder=tmp_path)
        assert (found.part.rates, found.rules) == ((1e-3,), {"a": 1e-3})
        assert read(f"part.rates=[{rate}]", f"rules.b={rate}").rules == {"b": 1e-3}

    def test_one_of_several_numbers_keeps_the_others(self, tmp_path: Path) -> None:
        found = read("rules.b=2", text="rules: {a: 1, b: 5}", folder=tmp_path)
        assert found.rules == {"a": 1.0, "b": 2.0}

    def test_null_and_back(self, tmp_path: Path) -> None:
        assert read("spare.size=5").spare == Part(size=5)
        assert read("spare=null", text="spare: {size: 4}", folder=tmp_path).spare is None

    def test_lists_of_parts(self, tmp_path: Path) -> None:
        found = read(text="items: [{name: a}, {name: b, weight: 2}]", folder=tmp_path)
        assert found.items == [Item("a"), Item("b", 2.0)]
        assert read("items=a").items == "a"
        assert read(text="items: {name: a, weight: 3}", folder=tmp_path).items == Item("a", 3.0)

    @hypothesis_settings(max_examples=15, deadline=None)
    @given(
        part=st.builds(
            Part,
            st.integers(-9, 9),
            st.lists(st.floats(-1e6, 1e6), max_size=3).map(tuple),
            st.tuples(st.floats(0, 1), st.floats(0, 1)),
        ),
        seeds=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
        layer=st.one_of(st.sampled_from(["last", "penultimate"]), st.integers(-3, 30)),
        verbose=st.booleans(),
    )
    def test_what_is_written_is_read(
        self, part: Part, seeds: Any, layer: Any, verbose: bool, tmp_path_factory: Any
    ) -> None:
        wanted = Whole("x", part, part, "here", seeds, layer, {"a": 0.5}, verbose)
        path = tmp_path_factory.mktemp("written") / "mine.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(wanted)))))
        assert read_settings(Whole, path=path) == wanted


class TestMistakes:
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("titel", "'title'"),
            ("part.sze", "'part.size'"),
            ("spare.beta", "'spare.betas'"),
            ("items.wieght", "'items.weight'"),
            ("prat.size", "'part"),
            ("size", "'part.size'"),
            ("weight", "'items.weight'"),
        ],
    )
    def test_unknown_key_names_the_nearest(self, given: str, meant: str) -> None:
        text = message(f"{given}=1")
        assert text.startswith("unknown probe key '")
        assert f"did you mean {meant}" in text

    @pytest.mark.parametrize(
        ("line", "meant"),
        [
            ("titel: a", "'title'"),
            ("part: {sze: 1}", "'part.size'"),
            ("items: {nmae: a}", "'items.name'"),
            ("items: [{name: a}, {name: b, wieght: 1}]", "'items.weight'"),
            ("1: 2", "items.name, items.weight, layer, part.betas"),
        ],
    )
    def test_unknown_key_in_a_file(self, mine: Path, line: str, meant: str) -> None:
        mine.write_text(line)
        assert meant in message(path=mine)

    def test_unknown_key_that_resembles_none(self) -> None:
        text = message("zzzz=1")
        assert text.startswith("unknown probe key 'zzzz'; allowed are ")
        for known in ("title", "part.size", "spare.rates", "items.weight", "seeds"):
            assert known in text

    @pytest.mark.parametrize("key", ["config", "help", "print_config", ""])
    def test_no_key_of_the_parser_itself(self, key: str) -> None:
        assert f"unknown probe key {key!r}" in message(f"{key}=1")

    @pytest.mark.parametrize("given", ["title", "--title", "part.size"])
    def test_not_an_override(self, given: str) -> None:
        assert message(given) == f"{given!r} is not an override; write key=value"

    @pytest.mark.parametrize(
        "override",
        [
            "seeds=4,x",
            "seeds=[1.5]",
            "seeds=[a]",
            "layer=first",
            "layer=1.5",
            "part.size=big",
            "part.size.x=1",
            "part.betas=[0.9]",
            "part.betas=[0.9,0.9,0.9]",
            "part.rates=[a]",
            "part=null",
            "rules.a=icy",
            "verbose=perhaps",
        ],
    )
    def test_wrong_type_names_the_key(self, override: str) -> None:
        key = override.partition("=")[0].removesuffix(".x").removesuffix(".a")
        assert f'"{key}"' in message(override)

    def test_missing_values_are_named(self, mine: Path) -> None:
        mine.write_text("item: {weight: 2}\n")
        text = message(kind=Strict, path=mine)
        assert "item.name" in text
        assert "count" in text
        assert read_settings(Strict, ["item.name=a", "count=2"]) == Strict(Item("a"), 2)

    @pytest.mark.parametrize("content", ["a: [1", "a:\n\tb: 1", "'"])
    def test_not_yaml(self, mine: Path, content: str) -> None:
        mine.write_text(content)
        text = message(path=mine)
        assert text.startswith(f"{mine} is not valid YAML: ")

    @pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text"])
    def test_not_a_mapping(self, mine: Path, content: str) -> None:
        mine.write_text(content)
        assert message(path=mine).startswith(f"{mine} is not a probe: it should be a mapping")

    def test_no_such_file(self, mine: Path) -> None:
        assert message(path=mine) == f"probe '{mine}' cannot be read: No such file or directory"
        assert "cannot be read: Is a directory" in message(path=mine.parent)

    def test_a_mistake_leaves_the_defaults(self) -> None:
        message("part.size=5", "part.sze=1")
        assert read() == Whole()


class TestCheckKeys:
    def test_content_without_a_file(self) -> None:
        check_keys({"part": {"size": 1}, "items": [{"name": "a"}, "b"], "spare": None}, Whole, "x")
        with pytest.raises(ValueError, match=r"unknown study key 'part.sizes'; did you mean 'part"):
            check_keys({"part": {"sizes": 1}}, Whole, "study")


def test_help_lists_every_key_with_its_meaning() -> None:
    text = settings_parser(Whole).format_help()
    for key, meaning in (("--title", "A text"), ("--part.betas", "Two of them"), ("--seeds", "")):
        assert key in text
        assert meaning in text
