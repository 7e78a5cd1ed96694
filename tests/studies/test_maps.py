"""Looking into runs: what is read, what is measured, and what cannot be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hive_vision.analysis.findings import Findings
from hive_vision.analysis.gradient_flow import weight_updates
from hive_vision.analysis.inspection import InspectedModel
from hive_vision.analysis.maps import attention_maps, gradient_maps
from hive_vision.data.sources import Source
from hive_vision.models.backbones import load_vision_model
from hive_vision.studies.maps import MapsArguments, look_inside
from hive_vision.training.arguments import DataArguments, ModelArguments, PretrainArguments
from hive_vision.training.pretrain import pretrain
from hive_vision.training.run_data import open_parts
from tests.training.conftest import stage

Runs = dict[str, str]


@pytest.fixture(scope="module")
def runs(
    backbone_folders: dict[str, Path],
    image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Runs of three methods, two steps for each of the last two stages."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for method in ("hive", "sa", "base"):
        found[method] = str(root / f"run-{method}")
        pretrain(
            PretrainArguments(
                model=ModelArguments(
                    vision=str(backbone_folders["siglip"]), language=str(backbone_folders["llama"])
                ),
                data=DataArguments(train=str(image_folder), holdout=0.2),
                method=method,
                output=found[method],
                micro_batch_size=4,
                stage1=stage(1, max_steps=0),
                stage2=stage(2),
                stage3=stage(3),
            )
        )
    return found


@pytest.fixture(scope="module")
def found(runs: Runs) -> Findings:
    return look_inside(runs, MapsArguments(samples=2, flow_samples=9))


def test_held_out_images_of_the_run_are_looked_at(
    found: Findings, runs: Runs, image_folder: Path
) -> None:
    (held_out,) = open_parts(DataArguments(train=str(image_folder), holdout=0.2)).held_out
    assert (found.images, len(held_out)) == (8, 8)
    assert found.data == str(image_folder)
    for row, shown in enumerate(found.shown):
        assert shown.picture.name == held_out.image_name(row)
        assert shown.picture.caption == held_out.captions_of(row)[0]
    assert len(found.shown) == 2


def test_maps_and_numbers_are_those_of_the_last_models(found: Findings, runs: Runs) -> None:
    assert list(found.flows) == list(found.numbers) == ["hive", "sa"]
    for name in ("hive", "sa"):
        model = InspectedModel.from_folder(Path(runs[name]) / "stage3" / "model")
        shown = found.shown[1]
        sample = model.prepare(shown.picture.image, shown.picture.caption)
        assert shown.tokens[name] == sample.tokens
        maps = gradient_maps(model, sample)
        np.testing.assert_allclose(shown.gradients[name].norms, maps.norms)
        attention = attention_maps(model, sample)
        np.testing.assert_allclose(shown.attention[name].weights, attention.weights)
        assert found.flows[name].norms.shape == (8, 8)
        assert found.flows[name].agreement.shape == (1, 8)
        mean = attention.weights.sum(axis=(-2, -1))
        seen = found.numbers[name].patches[1]
        if name == "hive":
            np.testing.assert_allclose(seen, mean.mean(axis=(1, 2)))
        else:  # the start token sees no image
            np.testing.assert_allclose(seen, mean[:, :, 1:].mean(axis=(1, 2)))
        assert not found.numbers[name].pointing


def test_weight_updates_by_stage(found: Findings, runs: Runs) -> None:
    assert list(found.updates) == ["hive", "sa"]
    updates = found.updates["hive"]
    assert list(updates) == ["stage2", "stage3", "all"]
    assert not updates["stage2"].any()
    start = load_vision_model(_recipe(runs["hive"])["model"]["vision"])
    end = load_vision_model(f"{runs['hive']}/encoder")
    for stages in ("stage3", "all"):
        np.testing.assert_allclose(updates[stages], weight_updates(start, end))
    assert updates["stage3"].all()


def test_encoders_are_compared_with_the_base_once(found: Findings) -> None:
    pairs = {frozenset(pair) for pair in found.cka}
    assert pairs == {frozenset(p) for p in (("hive", "sa"), ("hive", "base"), ("sa", "base"))}
    for matrix in found.cka.values():
        assert matrix.shape == (8, 8)
        assert ((matrix > 0) & (matrix <= 1 + 1e-9)).all()


def test_the_base_of_a_single_run_is_found(runs: Runs, image_folder: Path) -> None:
    arguments = MapsArguments(data=str(image_folder), samples=0, flow_samples=8)
    found = look_inside({"x": runs["hive"]}, arguments)
    ((pair, matrix),) = found.cka.items()
    assert pair == ("base", "x")
    assert found.shown == []
    assert matrix[0, 0] > 0.9, "two steps change little"
    assert look_inside({"x": runs["hive"]}, replace(arguments, cka=False)).cka == {}


def test_one_image_with_its_caption(runs: Runs, image_folder: Path) -> None:
    file = image_folder / "003.png"
    arguments = MapsArguments(image=str(file), caption="a red star", stage="stage2")
    found = look_inside({"h": runs["hive"]}, arguments)
    (shown,) = found.shown
    assert shown.picture.name == "003.png"
    assert shown.tokens["h"] == ("<s>", "a", "red", "star", "</s>")
    assert not found.flows
    assert not found.numbers
    assert not found.cka
    assert found.data == str(file)
    model = InspectedModel.from_folder(runs["hive"], "stage2")
    with Image.open(file) as image:
        expected = gradient_maps(model, model.prepare(image.convert("RGB"), "a red star"))
    assert np.array_equal(shown.gradients["h"].norms, expected.norms)


def test_a_model_folder_needs_data(runs: Runs, image_folder: Path) -> None:
    folder = f"{runs['hive']}/stage3/model"
    with pytest.raises(ValueError, match="does not say what captions it was trained on; give data"):
        look_inside({"x": folder}, MapsArguments())
    arguments = MapsArguments(data=str(image_folder), samples=1, flow_samples=0)
    found = look_inside({"x": folder}, arguments)
    assert [shown.picture.name for shown in found.shown] == ["000.png"]
    assert not found.updates


def test_validation_data_of_the_recipe_comes_first(
    runs: Runs, image_folder: Path, tmp_path: Path
) -> None:
    """Given as sources, and the split that the source names."""
    recipe = _recipe(runs["hive"])
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (32, 32)).save(other / "black.png")
    (other / "metadata.jsonl").write_text(
        json.dumps({"file_name": "black.png", "text": "a star"}) + "\n"
    )
    source = Source(str(other), caption_column="text")
    recipe["data"] |= {"validation": [vars(source)], "train": [vars(Source(str(image_folder)))]}
    run = tmp_path / "run"
    (run / "stage3").mkdir(parents=True)
    (run / "stage3" / "model").symlink_to(f"{runs['hive']}/stage3/model")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = look_inside({"x": str(run)}, MapsArguments(cka=False))
    assert [shown.picture.caption for shown in found.shown] == ["a star"]
    assert found.data == str(other)
    assert found.images == 1


def test_words_and_what_they_name(runs: Runs, tmp_path: Path) -> None:
    """Objects on the left half; of the second image no word is left."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    data.mkdir()
    masks.mkdir()
    lines = []
    long = "a small red circle and " * 40
    for number, caption in enumerate(("a blue star and a square", long + "a star", "a star")):
        name = f"{number}.png"
        Image.new("RGB", (32, 32), "navy").save(data / name)
        mask = np.zeros((32, 32), np.uint8)
        mask[:, :16], mask[:8, 24:] = 1, 2
        Image.fromarray(mask).save(masks / name)
        start = caption.index("star" if number else "blue star")
        left, corner = [0, 0, 16, 32], [24, 0, 32, 8]
        things: list[dict[str, Any]] = [{"words": [start, len(caption)], "box": left}]
        if number == 0:
            things = [{"words": [2, 11], "box": left}, {"words": [18, 24], "box": corner}]
        lines.append(json.dumps({"file_name": name, "caption": caption, "objects": things}))
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    arguments = MapsArguments(
        data=str(data), masks=str(masks), samples=0, flow_samples=3, cka=False
    )
    found = look_inside({"hive": runs["hive"], "sa": runs["sa"]}, arguments)
    for name in ("hive", "sa"):
        first, last = found.numbers[name].pointing
        assert first.area == pytest.approx((0.5 + 1 / 16) / 2)
        assert last.area == last.patches == 0.5
        model = InspectedModel.from_folder(runs[name])
        with Image.open(data / "2.png") as image:
            maps = attention_maps(model, model.prepare(image, "a star"))
        mean = maps.weights[:, :, 1:3].mean(axis=(1, 2))  # of "a" and "star"
        np.testing.assert_allclose(last.mass, mean[:, :, :2].sum((1, 2)) / mean.sum((1, 2)))
    (masks / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2.png does not say where the objects"):
        look_inside({"sa": runs["sa"]}, arguments)


def test_base_alone_reads_no_captions(runs: Runs) -> None:
    with pytest.raises(ValueError, match="no model reads captions; give a run of hive"):
        look_inside({"base": runs["base"]}, MapsArguments())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "x.png"}, "image and caption belong together"),
        ({"caption": "x"}, "image and caption belong together"),
        ({"image": "x", "caption": "y", "data": "z"}, "or data; not both"),
        ({"image": "x", "caption": " "}, "caption is empty"),
        ({"image": "x", "caption": "y", "masks": "z"}, "masks are of a data set"),
        ({"samples": -1}, "samples is -1; it must be at least 0"),
        ({"flow_samples": 1}, "flow_samples is 1; give at least 2"),
        ({"samples": 0, "flow_samples": 0}, "there is nothing to look at"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MapsArguments(**options)


def _recipe(run: str) -> Any:
    return yaml.safe_load((Path(run) / "recipe.yaml").read_text())
