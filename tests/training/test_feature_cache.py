"""Runs that keep a frozen encoder's features: what the plain path gives, and the encoder rests."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hive_vision.data import features
from hive_vision.models.backbones import backbones_of
from hive_vision.training import feature_cache
from hive_vision.training.arguments import FaultArguments, PretrainArguments
from hive_vision.training.errors import InterruptedRunError, TrainingError
from hive_vision.training.feature_cache import NOTE, CacheEstimate
from hive_vision.training.finetune import finetune
from hive_vision.training.job import Job
from hive_vision.training.pretrain import pretrain
from tests.conftest import IMAGE_SIZE, WORDS, vision_config
from tests.data.helpers import images_with_captions, write_coco
from tests.training.conftest import stage, write_conversations

Recipe = Callable[..., Any]
IMAGES, EACH, BAD = 20, 3, 5


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Images with several captions each; one of them cannot be read."""
    names, captions = images_with_captions(tmp_path, IMAGES, EACH, BAD, WORDS, IMAGE_SIZE)
    captions[7][1] = "  "
    return write_coco(tmp_path / "captions.json", names, captions)


@pytest.fixture
def run_of(recipe: Recipe, coco: Path, tmp_path: Path) -> Recipe:
    """Make a recipe of 8 steps in each of two frozen stages, and one that trains the encoder."""

    def make(name: str, cache: str = "always", **options: Any) -> PretrainArguments:
        data = {"train": str(coco), "holdout": 0.25, "max_bad_fraction": 0.3}
        data |= options.pop("data", {})
        stages = {
            "stage1": stage(1, max_steps=8, batch_size=6),
            "stage2": stage(2, max_steps=8, batch_size=6),
            "stage3": stage(3, max_steps=0),
        }
        options = {**stages, "micro_batch_size": 3, "cache_features": cache, **options}
        return recipe(data=data, output=str(tmp_path / name), **options)

    return make


class Calls:
    """Batches of images that encoders are given in the stages of runs."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.interrupt_at = 0
        self.is_training = False

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        # The cache looks at a blank image, and batches of text have one.
        if not self.is_training or len(pixels.unique()) == 1:
            return
        self.sizes.append(len(pixels))
        if len(self.sizes) == self.interrupt_at:
            raise InterruptedRunError("stopped between steps", 2)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Listen to the encoder of every job."""
    calls = Calls()
    load, train = Job.load_model, Job.train_stages

    def load_and_listen(job: Any, folder: Any) -> Any:
        model = load(job, folder)
        backbones_of(model)[0].register_forward_pre_hook(calls.note, with_kwargs=True)
        return model

    def train_and_listen(job: Any) -> Any:
        calls.is_training = True
        try:
            return train(job)
        finally:
            calls.is_training = False

    monkeypatch.setattr(Job, "load_model", load_and_listen)
    monkeypatch.setattr(Job, "train_stages", train_and_listen)
    return calls


def weights(folder: str | Path, name: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / name / "model" / "model.safetensors")


def assert_close(one: str, other: str, names: tuple[str, ...] = ("stage1", "stage2")) -> None:
    for name in names:
        first, second = weights(one, name), weights(other, name)
        assert first.keys() == second.keys()
        for key, weight in first.items():
            torch.testing.assert_close(weight, second[key], rtol=1e-4, atol=2e-5, msg=key)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(arguments: Any) -> list[float]:
    """Of every step and pass over held-out data."""
    logged = lines(Path(arguments.output) / "metrics.jsonl")
    return [line[key] for line in logged for key in ("loss", "held_out_loss") if key in line]


@pytest.mark.parametrize("method", ["hive", "cascaded", "sa"])
@pytest.mark.parametrize("group", [False, True])
def test_a_run_is_that_without(method: str, group: bool, run_of: Recipe, encoded: Calls) -> None:
    options = {"method": method, "data": {"group_captions": group}, "evaluate_every": 4}
    plain, cached = run_of("plain", "never", **options), run_of("cached", **options)
    expected = pretrain(plain)
    assert sum(encoded.sizes) > 2 * IMAGES
    encoded.sizes.clear()
    found = pretrain(cached)
    assert sum(encoded.sizes) == IMAGES - 1  # and one that cannot be read
    assert_close(plain.output, cached.output)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    for key in ("held_out_loss", "held_out_loss_shuffled_images"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
    assert found["bad_samples"] == expected["bad_samples"] > 0
    one, other = (lines(Path(a.output) / "bad_samples.jsonl") for a in (plain, cached))
    assert one == other
    assert {line["reason"][:13] for line in one} == {"empty caption", "UnidentifiedI"}
    assert not (Path(cached.output) / "features").exists()
    # Images of others would be noticed.
    assert found["held_out_loss"] != pytest.approx(found["held_out_loss_shuffled_images"])


def test_workers_and_bfloat16(run_of: Recipe) -> None:
    options: dict[str, Any] = {"precision": "bfloat16", "data": {"num_workers": 2}}
    plain, cached = run_of("plain", "never", **options), run_of("cached", **options)
    expected, found = pretrain(plain), pretrain(cached)
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-2)
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=2e-2)


def test_a_stage_that_trains_the_encoder_reads_images(run_of: Recipe, encoded: Calls) -> None:
    last = {"stage3": stage(3, max_steps=2, batch_size=6)}
    plain, cached = run_of("plain", "never", **last), run_of("cached", **last)
    expected, found = pretrain(plain), pretrain(cached)
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-4)
    notes = {path.parent.name for path in Path(cached.output).glob(f"*/{NOTE}")}
    assert notes == {"stage1", "stage2"}
    assert not (Path(cached.output) / "features").exists()


def test_gradient_records_need_no_encoder(run_of: Recipe, encoded: Calls) -> None:
    arguments = run_of("run", gradients_every=1)
    pretrain(arguments)
    assert sum(encoded.sizes) == IMAGES - 1
    logged = lines(Path(arguments.output) / "metrics.jsonl")
    assert not any("encoder_gradients" in line for line in logged)


@pytest.mark.parametrize("where", [("stage1", 3), ("stage2", 3)])
def test_stopped_in_a_stage_and_continued(
    where: tuple[str, int], run_of: Recipe, encoded: Calls
) -> None:
    undisturbed, stopped = run_of("a"), run_of("b")
    expected = pretrain(undisturbed)
    encoded.sizes.clear()
    with pytest.raises(InterruptedRunError):
        pretrain(stopped, where)
    found = pretrain(stopped)
    assert sum(encoded.sizes) == IMAGES - 1
    for name in ("stage1", "stage2"):
        one, other = weights(undisturbed.output, name), weights(stopped.output, name)
        assert all(torch.equal(weight, other[key]) for key, weight in one.items())
    assert found["held_out_loss"] == expected["held_out_loss"]


@pytest.mark.parametrize("save_seconds", [0.0, 99.0])
def test_stopped_in_the_pass_and_continued(
    save_seconds: float, run_of: Recipe, encoded: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SAVE_SECONDS", save_seconds)
    expected = pretrain(run_of("a"))
    whole = list(encoded.sizes)
    encoded.sizes.clear()
    encoded.interrupt_at = 4
    with pytest.raises(InterruptedRunError):
        pretrain(run_of("b"))
    state = json.loads((Path(run_of("b").output) / "features" / "features.json").read_text())
    assert state["done"] == 9
    done = encoded.sizes[:3]
    encoded.sizes.clear()
    encoded.interrupt_at = 0
    assert pretrain(run_of("b"))["held_out_loss"] == expected["held_out_loss"]
    assert done + encoded.sizes == whole


def test_features_of_other_weights_are_not_used(
    run_of: Recipe, encoded: Calls, tmp_path: Path, backbone_folders: dict[str, Path]
) -> None:
    folder = tmp_path / "vision"
    folder.mkdir()
    for path in backbone_folders["siglip"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    arguments = run_of("run", model={"vision": str(folder)})
    with pytest.raises(InterruptedRunError):
        pretrain(arguments, ("stage1", 8))  # its features are whole
    file = folder / "model.safetensors"
    changed = load_file(file)
    name = next(name for name in changed if "layers.0" in name and "weight" in name)
    changed[name] = changed[name] * 1.5
    save_file(changed, file, {"format": "pt"})
    for path in Path(arguments.output).glob("stage1*"):  # begin the stage again
        for inside in sorted(path.rglob("*"), reverse=True):
            inside.unlink() if inside.is_file() else inside.rmdir()
    encoded.sizes.clear()
    found = pretrain(arguments)
    assert sum(encoded.sizes) == IMAGES - 1
    expected = pretrain(run_of("plain", "never", model={"vision": str(folder)}))
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize("cache", ["always", "auto"])
@pytest.mark.parametrize("kind", ["naflex", "dropout"])
def test_encoders_whose_features_cannot_be_kept(
    kind: str,
    cache: str,
    run_of: Recipe,
    tmp_path: Path,
    backbone_folders: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    vision = backbone_folders["naflex"]
    reason = "different numbers of tokens"
    if kind == "dropout":
        vision, reason = tmp_path / "dropout", "at random"
        config = vision_config("siglip")
        config.attention_dropout = 0.1
        transformers.AutoModel.from_config(config).save_pretrained(vision)
        processor = transformers.AutoImageProcessor.from_pretrained(backbone_folders["siglip"])
        processor.save_pretrained(vision)
    arguments = run_of("run", cache, model={"vision": str(vision)})
    if cache == "always":
        with pytest.raises(ValueError, match=f"cache_features is always, but .*{reason}") as error:
            pretrain(arguments)
        assert "\n" not in str(error.value)
        return
    with caplog.at_level(logging.INFO):
        pretrain(arguments)
    assert any("not kept" in line and reason in line for line in caplog.messages)


def test_drop_path_is_noticed(run_of: Recipe, tmp_path: Path, backbone_folders: Any) -> None:
    config = vision_config("dinov2")
    config.drop_path_rate = 0.1
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "vision")
    processor = transformers.AutoImageProcessor.from_pretrained(backbone_folders["siglip"])
    processor.save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="at random while it trains; use auto or never"):
        pretrain(run_of("run", model={"vision": str(tmp_path / "vision")}))


@pytest.mark.parametrize("vision", ["clip", "dinov3", "timm"])
def test_other_encoders(vision: str, run_of: Recipe, encoded: Calls) -> None:
    plain, cached = run_of("plain", "never", vision=vision), run_of("cached", vision=vision)
    expected = pretrain(plain)
    encoded.sizes.clear()
    found = pretrain(cached)
    assert sum(encoded.sizes) == IMAGES - 1
    assert_close(plain.output, cached.output)
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-4)


def estimate(**changes: Any) -> CacheEstimate:
    """The paper's captions in stages 1 and 2 on a slow machine."""
    slow = CacheEstimate(
        images=100_000,
        reads=200_000,
        image_seconds=1.0,
        image_bytes=7_080_000,
        free_bytes=2_000_000_000_000,
    )
    return replace(slow, **changes)


class TestDecision:
    def test_saved_time_is_that_of_encoding_less_that_of_the_disk(self) -> None:
        moving = 7.08e6 / 0.5e9
        assert estimate().saved_seconds == pytest.approx(100_000 * (1 - 3 * moving))

    def test_a_slow_machine_keeps_them_and_a_fast_one_does_not(self) -> None:
        assert estimate().pays
        # 2 * 303e6 parameters * 576 tokens at 40% of 989 TFLOP/s
        assert not estimate(image_seconds=0.0009, reads=10_000_000).pays

    @pytest.mark.parametrize("reads", [50_000, 100_000])
    def test_images_that_are_read_once_are_not_kept(self, reads: int) -> None:
        assert not estimate(reads=reads).pays

    def test_a_few_seconds_are_not_worth_it(self) -> None:
        tiny = estimate(images=100, image_bytes=1000, reads=150)
        assert 0 < tiny.saved_seconds < 60
        assert not tiny.pays
        assert replace(tiny, reads=200).pays

    def test_at_most_half_of_the_disk(self) -> None:
        needed = 100_000 * 7_080_000
        assert estimate(free_bytes=2 * needed).pays
        assert not estimate(free_bytes=2 * needed - 1).pays

    def test_several_processes_share_the_plain_work_only(self) -> None:
        assert not estimate(processes=2).pays
        assert estimate(processes=2, reads=400_000).pays

    def test_says_its_numbers_in_a_line(self) -> None:
        said = str(estimate())
        for number in ("100,000", "200,000", "708.0 GB", "2,000.0 GB", "1 s an image", "0.5 GB/s"):
            assert number in said
        assert "\n" not in said


def test_auto_keeps_features_where_it_pays_and_stays_with_it(
    run_of: Recipe, encoded: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "WORTHWHILE_SECONDS", -99.0)
    arguments = run_of("run", "auto")
    with pytest.raises(InterruptedRunError):
        pretrain(arguments, ("stage1", 3))
    monkeypatch.setattr(feature_cache, "WORTHWHILE_SECONDS", 1e9)
    pretrain(arguments)
    assert sum(encoded.sizes) == IMAGES - 1
    encoded.sizes.clear()
    other = run_of("other", "auto")
    with pytest.raises(InterruptedRunError):
        pretrain(other, ("stage1", 3))
    monkeypatch.setattr(feature_cache, "WORTHWHILE_SECONDS", -99.0)
    with pytest.raises(InterruptedRunError):
        pretrain(other, ("stage1", 8))
    assert len(encoded.sizes) >= 16
    assert not (Path(other.output) / "features").exists()


def test_little_work_is_not_measured(run_of: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(feature_cache, "find_device", fail)
    few = {"stage1": stage(1), "stage2": stage(2), "data": {"max_held_out": 1}}
    pretrain(run_of("run", "auto", **few))


@pytest.mark.parametrize("cache", ["always", "auto"])
def test_a_small_disk(
    cache: str, run_of: Recipe, encoded: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "WORTHWHILE_SECONDS", -99.0)
    needed = IMAGES * 2 * 16 * 32 * 4
    monkeypatch.setattr(features.FeatureStore, "free_bytes", lambda store: 2 * needed - 1)
    arguments = run_of("run", cache)
    if cache == "auto":
        pretrain(arguments)
        assert sum(encoded.sizes) > 2 * IMAGES
        return
    with pytest.raises(ValueError, match=r"half of the free disk is too little .*; make room"):
        pretrain(arguments)
    monkeypatch.setattr(features.FeatureStore, "free_bytes", lambda store: 2 * needed)
    encoded.sizes.clear()
    pretrain(arguments)
    assert sum(encoded.sizes) == IMAGES - 1


def test_a_disk_that_is_full_is_one_line(run_of: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(features.FeatureStore, "append", fail)
        with pytest.raises(TrainingError, match=r"No space left .*cache_features=never") as error:
            pretrain(run_of("run"))
    assert "\n" not in str(error.value)
    pretrain(run_of("run", "never"))  # which may be changed


def test_a_long_pass_is_no_stall(run_of: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Listening(feature_cache.Watchdog):
        def pause(self, doing: str) -> None:
            told.append(doing)
            super().pause(doing)

        def progress(self, doing: str) -> None:
            told.append(doing)
            super().progress(doing)

    monkeypatch.setattr("hive_vision.training.job.Watchdog", Listening)
    pretrain(run_of("run", faults=FaultArguments(stall_seconds=60)))
    assert sum(line.startswith("computing features") for line in told) == 7  # batches of three
    assert told.index("looking at the encoder's features") == 0


def test_others_are_not_kept_waiting(
    run_of: Recipe, encoded: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pretrain(run_of("a"))
    whole = list(encoded.sizes)
    encoded.sizes.clear()
    monkeypatch.setattr(feature_cache, "_patience", lambda: 0.0)  # each batch is a piece
    assert pretrain(run_of("b"))["held_out_loss"] == expected["held_out_loss"]
    assert encoded.sizes == whole


def test_a_sharded_encoder_has_no_cache(run_of: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "is_sharded", lambda arguments: True)
    with pytest.raises(ValueError, match=r"always, but with sharding=fsdp2 .*; use auto or never"):
        pretrain(run_of("run"))


def test_fine_tuning_is_that_without(vlm_recipe: Recipe, encoded: Calls, tmp_path: Path) -> None:
    chat = write_conversations(tmp_path / "bad")
    (tmp_path / "bad" / "5-0.png").write_bytes(b"this is no image")
    steps = {"stage1": {"max_steps": 8}, "stage2": {"max_steps": 8}}
    data = {"train": str(chat), "max_bad_fraction": 0.3}

    def run(name: str, cache: str) -> tuple[Any, dict[str, Any]]:
        arguments = vlm_recipe(
            output=str(tmp_path / name), data=dict(data), cache_features=cache, **steps
        )
        return arguments, finetune(arguments)

    plain, expected = run("plain", "never")
    encoded.sizes.clear()
    cached, found = run("cached", "always")
    # 24 images, one of them bad, once for each stage, whose data differ.
    assert sum(encoded.sizes) == 2 * 23
    assert_close(plain.output, cached.output)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    assert found["bad_samples"] == expected["bad_samples"]
    assert sum(found["bad_samples"].values()) > 0
    for one, other in zip(found["stages"], expected["stages"], strict=True):
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-4)


def test_a_run_that_was_begun_before_the_key_existed(run_of: Recipe) -> None:
    arguments = run_of("run", "auto")
    with pytest.raises(InterruptedRunError):
        pretrain(arguments, ("stage1", 3))
    saved = Path(arguments.output) / "recipe.yaml"
    text = saved.read_text()
    saved.write_text(text.replace("cache_features: auto\n", ""))
    assert saved.read_text() != text
    pretrain(arguments)
