"""Recipes: those that are shipped, overrides, and what a mistake in one says."""

import dataclasses
import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from hive_vision.data.sources import Source
from hive_vision.training.arguments import (
    FinetuneArguments,
    PretrainArguments,
    StageArguments,
)
from hive_vision.training.recipes import (
    FINETUNE,
    load_any_recipe,
    load_finetune_recipe,
    load_recipe,
    recipe_names,
    recipe_path,
)

GROUPS = {"vision_model", "vision_tail", "projectors", "cross_attentions", "language_model"}


def misfits(value: Any, hint: Any, key: str) -> list[str]:
    """Name what does not have the type that it is declared to have."""
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):
            return [f"{key}={value!r} is no {hint.__name__}"]
        hints = get_type_hints(hint)
        return [m for n, h in hints.items() for m in misfits(getattr(value, n), h, f"{key}.{n}")]
    if origin in (Union, UnionType):
        found = [misfits(value, option, key) for option in inner]
        return [] if [] in found else min(found, key=len)
    if origin is Literal:
        return [] if value in inner else [f"{key}={value!r} is not among {inner}"]
    if origin is list:
        fits = isinstance(value, list)
        return (
            [m for v in value for m in misfits(v, inner[0], key)] if fits else [f"{key}={value!r}"]
        )
    if origin is tuple:
        if not isinstance(value, tuple) or len(value) != len(inner):
            return [f"{key}={value!r} is not {hint}"]
        return [m for v, h in zip(value, inner, strict=True) for m in misfits(v, h, key)]
    if origin is dict:
        return [m for k, v in value.items() for m in misfits(v, inner[1], f"{key}.{k}")]
    if hint is NoneType or value is None:
        return [] if hint is NoneType and value is None else [f"{key}={value!r} is not {hint}"]
    return [] if type(value) is hint else [f"{key}={value!r} is not {hint.__name__}"]


def message(*overrides: str, recipe: str | Path = "debug") -> str:
    with pytest.raises(ValueError) as failure:  # noqa: PT011  returned
        load_recipe(recipe, overrides)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("output: out\nmodel: {vision: v, language: l}\ndata: {train: t}\n")
    return path


def test_recipes_of_the_other_command_are_told_apart() -> None:
    assert message(recipe="vlm-miniature").startswith(
        "'vlm-miniature' is a recipe of hive-vision finetune; here are allowed debug, "
    )
    with pytest.raises(ValueError, match="'miniature' is a recipe of hive-vision pretrain"):
        load_finetune_recipe("miniature")


class TestShipped:
    def test_the_promised_ones_are_there(self) -> None:
        assert {"debug", "miniature"} <= set(recipe_names())
        assert recipe_names() == sorted(recipe_names())

    @pytest.mark.parametrize("name", recipe_names())
    def test_every_value_has_its_type(self, name: str) -> None:
        recipe = load_recipe(name)
        assert isinstance(recipe, PretrainArguments)
        assert misfits(recipe, PretrainArguments, name) == []

    @pytest.mark.parametrize("name", recipe_names())
    def test_says_what_its_file_says(self, name: str) -> None:
        content = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
        recipe = load_recipe(name)
        assert recipe.output == content["output"]
        assert recipe.model.vision == content["model"]["vision"]
        train = content["data"]["train"]
        assert recipe.data.train == (Source(**train) if isinstance(train, dict) else train)
        for stage, arguments in recipe.stages.items():
            for key, value in content[stage].items():
                have = getattr(arguments, key)
                assert (list(have) if isinstance(have, tuple) else have) == value

    @pytest.mark.parametrize("name", recipe_names())
    def test_stages_are_complete(self, name: str) -> None:
        for stage in load_recipe(name).stages.values():
            assert stage.steps(1000) >= 0
            assert set(stage.rules) <= GROUPS
            assert {"vision_model", "language_model", "projectors"} <= set(stage.rules)

    @pytest.mark.parametrize("name", recipe_names())
    def test_is_commented(self, name: str) -> None:
        assert recipe_path(name).read_text(encoding="utf-8").startswith("# ")


class TestOverrides:
    def test_over_file_over_default(self, minimal: Path) -> None:
        assert load_recipe(minimal).stage1.batch_size == StageArguments().batch_size
        with minimal.open("a") as file:
            file.write("stage1: {batch_size: 8, weight_decay: 0.5}\n")
        assert load_recipe(minimal).stage1.batch_size == 8
        changed = load_recipe(minimal, ["stage1.batch_size=4"])
        assert (changed.stage1.batch_size, changed.stage1.weight_decay) == (4, 0.5)
        assert changed.stage2 == StageArguments()

    def test_one_rule_keeps_the_others_and_their_order(self) -> None:
        before = load_recipe("debug")
        after = load_recipe("debug", ["stage1.rules.projectors=1e-4"])
        assert after.stage1.rules == before.stage1.rules | {"projectors": 1e-4}
        assert list(after.stage1.rules) == list(before.stage1.rules)
        assert after.stage1.max_steps == before.stage1.max_steps
        assert after.stage2 == before.stage2

    def test_one_rule_beside_other_overrides(self) -> None:
        changed = load_recipe(
            "debug",
            ["stage1.max_steps=3", "stage1.rules.projectors=frozen", "stage1.rules.vision_model=2"],
        )
        assert changed.stage1.max_steps == 3
        assert changed.stage1.rules["projectors"] == "frozen"
        assert changed.stage1.rules["vision_model"] == 2.0
        assert changed.stage1.rules["cross_attentions"] == 2e-3

    def test_all_rules_at_once(self) -> None:
        changed = load_recipe("debug", ["stage1.rules={projectors: 1e-4, vision_model: frozen}"])
        assert changed.stage1.rules == {"projectors": 1e-4, "vision_model": "frozen"}

    @pytest.mark.parametrize("rate", ["1e-3", "1.0e-3", "0.001"])
    def test_learning_rates_however_they_are_written(self, minimal: Path, rate: str) -> None:
        # YAML itself reads 1e-3 as text.
        with minimal.open("a") as file:
            file.write(f"stage1: {{rules: {{projectors: {rate}}}}}\n")
        assert load_recipe(minimal).stage1.rules == {"projectors": 1e-3}
        over = load_recipe(minimal, [f"stage2.rules.projectors={rate}"])
        assert over.stage2.rules == {"projectors": 1e-3}

    def test_null(self) -> None:
        changed = load_recipe(
            "debug", ["miniature=null", "stage1.max_steps=null", "stage1.epochs=2"]
        )
        assert changed.miniature is None
        assert (changed.stage1.max_steps, changed.stage1.epochs) == (None, 2.0)
        assert load_recipe("debug", ["data.validation=null"]).data.validation is None

    def test_inside_the_miniature(self) -> None:
        before = load_recipe("debug").miniature
        after = load_recipe("debug", ["miniature.data.train_scenes=5"]).miniature
        assert after == dataclasses.replace(
            before, data=dataclasses.replace(before.data, train_scenes=5)
        )

    def test_lists(self) -> None:
        changed = load_recipe("debug", ["model.layer_selection=[1,4]", "stage1.betas=[0.8,0.9]"])
        assert changed.model.layer_selection == [1, 4]
        assert changed.stage1.betas == (0.8, 0.9)

    def test_a_recipe_stays_as_it_is(self) -> None:
        load_recipe("debug", ["seed=7", "stage1.rules.projectors=7"])
        assert load_recipe("debug").seed == 0
        assert load_recipe("debug").stage1.rules["projectors"] == 2e-3


class TestSources:
    def train(self, minimal: Path, text: str) -> Any:
        minimal.write_text(minimal.read_text().replace("{train: t}", f"{{train: {text}}}"))
        return load_recipe(minimal).data.train

    def test_a_source(self, minimal: Path) -> None:
        chat = Source("chat.json", images="images", format="llava")
        assert self.train(minimal, "{path: chat.json, images: images, format: llava}") == chat
        assert load_recipe(minimal, ["data.train=photos"]).data.train == "photos"
        assert load_recipe(minimal, ["data.train.weight=2"]).data.train.weight == 2.0

    def test_mixture(self, minimal: Path) -> None:
        text = "[{path: a, weight: 0.5}, {path: b, caption_column: text}]"
        expected = [Source("a", weight=0.5), Source("b", caption_column="text")]
        assert self.train(minimal, text) == expected

    @pytest.mark.parametrize("text", ["{pth: a}", "[{path: b}, {path: a, imagse: i}]"])
    def test_unknown_key(self, minimal: Path, text: str) -> None:
        minimal.write_text(minimal.read_text().replace("{train: t}", f"{{train: {text}}}"))
        assert "did you mean 'data.train." in message(recipe=minimal)

    @pytest.mark.parametrize("text", ["{path: a, format: lava}", "{path: a, weight: -1}", "7"])
    def test_wrong_value(self, minimal: Path, text: str) -> None:
        minimal.write_text(minimal.read_text().replace("{train: t}", f"{{train: {text}}}"))
        message(recipe=minimal)

    def test_examples_of_the_documentation(self, minimal: Path) -> None:
        page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
        (example,) = re.findall(r"```yaml\n(data:.*?)```", page, re.DOTALL)
        minimal.write_text(minimal.read_text().replace("data: {train: t}\n", example))
        data = load_recipe(minimal).data
        assert [source.weight for source in data.train] == [1.0, 0.5, 2.0]
        assert data.validation == Source("user/captions", split="test", image_column="picture")


class TestMistakes:
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("sead", "seed"),
            ("modle.vision", "model"),
            ("model.vison", "model.vision"),
            ("stage1.max_step", "stage1.max_steps"),
            ("stage4.max_steps", "stage"),
            ("max_steps", "max_steps"),
            ("data.captions_column", "data.caption_column"),
            ("miniature.fodler", "miniature.folder"),
            ("miniature.data.train_scene", "miniature.data.train_scenes"),
        ],
    )
    def test_unknown_key_names_the_nearest(self, given: str, meant: str) -> None:
        text = message(f"{given}=1")
        assert f"unknown recipe key '{given.partition('.')[0]}" in text
        assert "did you mean" in text
        assert meant in text.partition("did you mean")[2]

    @pytest.mark.parametrize(
        ("line", "meant"), [("sead: 1", "'seed'"), ("stage1: {warmpu: 0}", "'stage1.warmup'")]
    )
    def test_unknown_key_in_a_file(self, minimal: Path, line: str, meant: str) -> None:
        with minimal.open("a") as file:
            file.write(line + "\n")
        assert f"did you mean {meant}" in message(recipe=minimal)

    @pytest.mark.parametrize(
        "override",
        [
            "seed=abc",
            "seed=1.5",
            "method=hiv",
            "stage1.max_steps=2.5",
            "stage1.betas=[0.9]",
            "stage1.rules.projectors=icy",
            "data.holdout=much",
            "gradient_checkpointing=perhaps",
            "model.layer_selection=middle",
            "model.decoder_layers=3",
            "seed.x=1",
            "stage1=null",
        ],
    )
    def test_wrong_type_names_the_key(self, override: str) -> None:
        key = override.partition("=")[0].removesuffix(".projectors").removesuffix(".x")
        assert key in message(override)

    def test_missing_keys_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("output: out\nmodel: {vision: v}\n")
        text = message(recipe=path)
        assert "model.language" in text
        assert "data.train" in text

    def test_unknown_recipe(self) -> None:
        assert "did you mean 'debug'" in message(recipe="debugg")
        assert "debug, " in message(recipe="runs/nowhere.yaml")

    def test_folder_instead_of_recipe(self, tmp_path: Path) -> None:
        assert "unknown recipe" in message(recipe=tmp_path)


class TestPath:
    def test_a_file_goes_before_a_name(
        self, tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert recipe_path("debug").name == "debug.yaml"
        minimal.rename(tmp_path / "debug")
        assert load_recipe("debug").output == "out"


def test_file_that_does_not_exist_is_no_unknown_name():
    with pytest.raises(ValueError, match=r"recipe './nope.yaml' does not exist"):
        load_recipe("./nope.yaml")


class TestFinetuning:
    @pytest.mark.parametrize("name", recipe_names(FINETUNE))
    def test_every_value_has_its_type(self, name: str) -> None:
        recipe = load_finetune_recipe(name)
        assert misfits(recipe, FinetuneArguments, name) == []
        assert recipe_path(name, FINETUNE).read_text(encoding="utf-8").startswith("# ")

    def test_the_paper_is_table_5(self) -> None:
        recipe = load_finetune_recipe("vlm-paper")
        connector, language = recipe.stages.values()
        for stage, steps, batch, warmup, peak, moving in (
            (connector, 2180, 256, 66, 1e-3, "projectors"),
            (language, 11540, 64, 347, 2e-5, "language_model"),
        ):
            assert (stage.max_steps, stage.batch_size) == (steps, batch)
            assert math.ceil(stage.warmup * steps) == warmup
            rates = {group: rate for group, rate in stage.rules.items() if rate != "frozen"}
            assert rates == {moving: peak}
            assert stage.min_learning_rate == stage.weight_decay == 0
            assert (stage.betas, stage.max_grad_norm) == ((0.9, 0.999), 1.0)
        assert recipe.model.vision == "google/siglip-large-patch16-384"
        assert recipe.model.language == "meta-llama/Llama-3.2-1B-Instruct"
        # Its iterations are one pass over the data that its numbers fit.
        assert round(558_128 / 256) == 2180
        assert 738_601 // 64 == 11540

    def test_the_open_one_differs_in_models_only(self) -> None:
        paper, other = (load_finetune_recipe(name) for name in ("vlm-paper", "vlm-smollm2"))
        same = dataclasses.replace(other, model=paper.model, output=paper.output)
        assert same == paper
        assert other.model.language == "HuggingFaceTB/SmolLM2-360M-Instruct"

    def test_either_kind_by_its_content(self, minimal: Path, tmp_path: Path) -> None:
        assert isinstance(load_any_recipe("vlm-paper", ["seed=3"]), FinetuneArguments)
        assert isinstance(load_any_recipe("debug"), PretrainArguments)
        assert isinstance(load_any_recipe(minimal), PretrainArguments)
        copy = tmp_path / "copy.yaml"
        copy.write_text(recipe_path("vlm-paper", FINETUNE).read_text())
        assert load_any_recipe(copy) == load_finetune_recipe("vlm-paper")
        broken = tmp_path / "broken.yaml"
        broken.write_text("a: [")
        with pytest.raises(ValueError, match="not valid YAML"):
            load_any_recipe(broken)
