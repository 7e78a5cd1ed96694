"""Looking into runs: what is read, what is measured, and what cannot be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hive_vision.analysis.attention import attention_spread
from hive_vision.analysis.cka import cka_matrix, layer_means
from hive_vision.analysis.findings import MapFindings
from hive_vision.analysis.gradient_flow import gradient_flow, weight_updates
from hive_vision.analysis.inspection import InspectedModel
from hive_vision.analysis.maps import attention_maps, gradient_maps
from hive_vision.data.images import decode_image
from hive_vision.data.sources import Source
from hive_vision.models.backbones import load_vision_model
from hive_vision.models.processing import load_image_processor
from hive_vision.studies import maps
from hive_vision.studies.map_arguments import MapsArguments
from hive_vision.studies.maps import look_inside
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
def found(runs: Runs) -> MapFindings:
    return look_inside(runs, MapsArguments(samples=2, flow_samples=9))


def test_held_out_images_of_the_run_are_looked_at(
    found: MapFindings, runs: Runs, image_folder: Path
) -> None:
    (held_out,) = open_parts(DataArguments(train=str(image_folder), holdout=0.2)).held_out
    assert (found.images, len(held_out)) == (8, 8)
    assert found.data == str(image_folder)
    for row, shown in enumerate(found.shown):
        assert shown.picture.name == held_out.image_name(row)
        assert shown.picture.caption == held_out.captions_of(row)[0]
    assert len(found.shown) == 2


def test_maps_and_numbers_are_those_of_the_last_models(found: MapFindings, runs: Runs) -> None:
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
        spread = attention_spread(attention)
        for quantity in ("entropy", "distance"):
            wanted = getattr(spread, quantity).mean(axis=1)
            np.testing.assert_allclose(getattr(found.numbers[name], quantity)[1], wanted)


def test_numbers_are_over_flow_samples_of_the_stage_asked_for(
    found: MapFindings, runs: Runs
) -> None:
    arguments = MapsArguments(samples=3, flow_samples=2, stage="stage2")
    early = look_inside({"hive": runs["hive"]}, arguments)
    assert (len(early.shown), early.images) == (3, 2)
    model = InspectedModel.from_folder(runs["hive"], "stage2")
    samples = [model.prepare(s.picture.image, s.picture.caption) for s in early.shown[:2]]
    wanted = gradient_flow(model, samples).norms
    np.testing.assert_allclose(early.flows["hive"].norms, wanted)
    assert not np.allclose(wanted, found.flows["hive"].norms[:2], rtol=1e-6)


def test_weight_updates_by_stage(found: MapFindings, runs: Runs) -> None:
    assert list(found.updates) == ["hive", "sa"]
    updates = found.updates["hive"]
    assert list(updates) == ["stage2", "stage3", "all"]
    assert not updates["stage2"].any()
    start = load_vision_model(_recipe(runs["hive"])["model"]["vision"])
    end = load_vision_model(f"{runs['hive']}/encoder")
    for stages in ("stage3", "all"):
        np.testing.assert_allclose(updates[stages], weight_updates(start, end))
    assert updates["stage3"].all()


def test_weight_updates_are_from_one_stage_to_the_next(runs: Runs, tmp_path: Path) -> None:
    """A run whose first stage moved its encoder, and whose second stage moved it back."""
    (tmp_path / "recipe.yaml").symlink_to(f"{runs['hive']}/recipe.yaml")
    for stage_, other in (("stage1", "stage3"), ("stage2", "stage2")):
        (tmp_path / stage_).mkdir()
        (tmp_path / stage_ / "model").symlink_to(f"{runs['hive']}/{other}/model")
    found = look_inside({"x": str(tmp_path)}, MapsArguments(samples=1, flow_samples=0))
    updates = found.updates["x"]
    assert updates["stage1"].all()
    np.testing.assert_allclose(updates["stage2"], updates["stage1"], rtol=0.01)
    assert not updates["all"].any()


def test_encoders_are_compared_with_the_base_once(
    found: MapFindings, runs: Runs, image_folder: Path
) -> None:
    pairs = {frozenset(pair) for pair in found.cka}
    assert pairs == {frozenset(p) for p in (("hive", "sa"), ("hive", "base"), ("sa", "base"))}
    for matrix in found.cka.values():
        assert matrix.shape == (8, 8)
        assert ((matrix > 0) & (matrix <= 1 + 1e-9)).all()
    (held_out,) = open_parts(DataArguments(train=str(image_folder), holdout=0.2)).held_out
    images = [decode_image(held_out.read_image(row)) for row in range(8)]
    folders = {name: f"{runs[name]}/encoder" for name in ("hive", "sa")}
    means = {
        name: layer_means(load_vision_model(folder), load_image_processor(folder), images)
        for name, folder in folders.items()
    }
    wanted = cka_matrix(means["hive"], means["sa"])
    np.testing.assert_allclose(found.cka["hive", "sa"], wanted, atol=1e-4)
    assert np.abs(wanted - wanted.T).max() > 1e-3


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
        assert np.isnan(last.others).all(), "there is no other object"
        assert not np.isnan(first.others).any()
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
        ({"heads": 9}, "hive: heads is 9; the model has heads 1 to 4"),
        ({"tokens": ["cat"]}, "hive: tokens has 'cat'; the caption's tokens"),
        ({"layers": [1]}, r"hive: layers has 1; attention is in layers \[2, 4\]"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_measured(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def measured(*_: Any) -> None:
        pytest.fail("it was measured first")

    for name in ("gradient_flow", "weight_updates", "layer_means"):
        monkeypatch.setattr(maps, name, measured)
    # The last model is the one that cannot do it.
    models = {"sa": runs["sa"], "hive": runs["hive"]} if "layers" in options else runs
    with pytest.raises(ValueError, match=message):
        look_inside(models, MapsArguments(samples=1, **options))


def test_paths_of_a_recipe_that_are_not_found_from_here(
    runs: Runs, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in ``home``, with relative paths; looked into from ``away``."""
    home, away = tmp_path / "home", tmp_path / "away"
    (home / "stage3").mkdir(parents=True)
    away.mkdir()
    (home / "stage3" / "model").symlink_to(f"{runs['hive']}/stage3/model")
    (home / "photos").symlink_to(image_folder)
    recipe = _recipe(runs["hive"])
    vision = recipe["model"]["vision"]
    (home / "siglip").symlink_to(vision)
    recipe["data"]["train"] = "photos"
    recipe["model"]["vision"] = "./siglip"
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    few = MapsArguments(samples=1, flow_samples=0)
    monkeypatch.chdir(home)
    assert look_inside({"x": str(home)}, few).data == "photos"
    monkeypatch.chdir(away)
    with pytest.raises(ValueError, match=r"has model.vision './siglip', .*not found from .*away'"):
        look_inside({"x": str(home)}, few)
    recipe["model"]["vision"] = vision
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        ValueError, match=r"data 'photos', .*away'.* there, or give data"
    ) as failure:
        look_inside({"x": str(home)}, few)
    assert "\n" not in str(failure.value)
    there = replace(few, data=str(image_folder))
    assert look_inside({"x": str(home)}, there).data == str(image_folder)


def test_images_are_named(runs: Runs, tmp_path: Path) -> None:
    missing = MapsArguments(image="gone.png", caption="a star")
    with pytest.raises(ValueError, match=r"image 'gone.png' cannot be read: it does not exist"):
        look_inside({"x": runs["hive"]}, missing)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bad.png", "caption": "a star"}\n')
    with pytest.raises(ValueError, match=r"image 'bad.png of .*' cannot be read: cannot identify"):
        look_inside({"x": runs["hive"]}, MapsArguments(data=str(tmp_path)))


def test_captions_that_are_cut_are_counted(
    runs: Runs, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = MapsArguments(image=str(image_folder / "003.png"), caption="a red star " * 40)
    look_inside({"x": runs["hive"]}, long)
    (warning,) = [r.getMessage() for r in caplog.records if "were cut" in r.getMessage()]
    assert "x reads at most 77 tokens: 1 of 1 captions are longer and were cut, by up to" in warning
    caplog.clear()
    look_inside({"x": runs["hive"]}, replace(long, caption="a red star"))
    assert "cut" not in caplog.text


def test_attention_knows_its_layers(found: MapFindings) -> None:
    assert {name: n.layers for name, n in found.numbers.items()} == {
        name: found.shown[0].attention[name].layers for name in ("hive", "sa")
    }


def test_trainings_of_encoders(found: MapFindings, runs: Runs) -> None:
    rate = _recipe(runs["hive"])["stage3"]["rules"]["vision_model"]
    assert found.encoder_training == dict.fromkeys(("hive", "sa"), f"stage3 2 steps at {rate}")
    short = look_inside({"x": runs["hive"]}, MapsArguments(stage="stage2", flow_samples=0))
    assert short.encoder_training == {"x": "frozen"}


def _recipe(run: str) -> Any:
    return yaml.safe_load((Path(run) / "recipe.yaml").read_text())
