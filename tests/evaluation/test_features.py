"""Features against transformers' own hidden states, and the folder that they are kept in."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification

from hive_vision.data.classification import LabelledImages
from hive_vision.evaluation import features as module
from hive_vision.evaluation.features import Features, FrozenEncoder, Reading, read_features
from tests.evaluation.helpers import encoded, from_bytes, noise

PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "vit": 1, "dinov3": 5, "aimv2": 0}
COUNT, BATCH = 7, 3


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    return noise(COUNT)


@pytest.fixture(scope="module")
def encoders(backbone_folders: dict[str, Path]) -> Callable[[str], FrozenEncoder]:
    loaded: dict[str, FrozenEncoder] = {}

    def load(family: str) -> FrozenEncoder:
        if family not in loaded:
            loaded[family] = FrozenEncoder.load(backbone_folders[family])
        return loaded[family]

    return load


@pytest.fixture
def clip(encoders: Callable[[str], FrozenEncoder]) -> FrozenEncoder:
    return encoders("clip")


def pictures(images: LabelledImages) -> list[Any]:
    return [images[row] for row in range(len(images))]


@torch.no_grad()
def hidden_states(
    encoder: FrozenEncoder, images: LabelledImages
) -> tuple[tuple[Tensor, ...], Tensor]:
    """All hidden states as transformers gives them, and what the pooling head makes."""
    processor = AutoImageProcessor.from_pretrained(encoder.name)
    pixels = processor(pictures(images), return_tensors="pt")["pixel_values"]
    output = encoder.model(pixels, output_hidden_states=True)
    assert len(output.hidden_states) == 8 + 1
    return output.hidden_states, output.pooler_output


def close(found: Features, expected: Tensor, atol: float = 1e-5) -> None:
    assert found.values.shape == tuple(expected.shape)
    np.testing.assert_allclose(found.values, expected.numpy(), atol=atol)


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


def leftovers(cache: Path) -> list[str]:
    """What is neither an entry nor the lock."""
    hidden = (path.name for path in cache.iterdir() if path.name.startswith("."))
    return [name for name in hidden if not name.endswith(".lock")]


def message(failing: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as failure:  # noqa: PT011  returned
        failing()
    assert "\n" not in str(failure.value)
    return str(failure.value)


class TestAgainstTransformers:
    @pytest.mark.parametrize("family", PREFIX_TOKENS)
    def test_every_pooling_of_every_family(
        self,
        family: str,
        encoders: Callable[[str], FrozenEncoder],
        images: LabelledImages,
        tmp_path: Path,
    ) -> None:
        prefix = PREFIX_TOKENS[family]
        encoder = encoders(family)
        hidden, pooled = hidden_states(encoder, images)
        assert (encoder.depth, encoder.width, encoder.prefix_tokens) == (8, 32, prefix)
        assert hidden[-1].shape[1] == prefix + 16
        readings = {
            Reading(8): hidden[8][:, prefix:].mean(dim=1),
            Reading(3): hidden[3][:, prefix:].mean(dim=1),
            Reading(8, keep_prefix=True): hidden[8].mean(dim=1),
            Reading(8, "head"): pooled,
            Reading(7, "tokens"): hidden[7][:, prefix:],
            Reading(7, "tokens", keep_prefix=True): hidden[7],
        }
        if prefix:
            readings |= {Reading(7, "cls"): hidden[7][:, 0], Reading(8, "cls"): hidden[8][:, 0]}
        found = read_features(encoder, images, list(readings), tmp_path, BATCH)
        for (reading, expected), features in zip(readings.items(), found, strict=True):
            whole = reading.pooling == "tokens"
            close(features, expected, 5e-3 if whole else 1e-5)
            assert features.values.dtype == (np.float16 if whole else np.float32)
            assert isinstance(features.values, np.memmap)
            assert features.mask is None

    @torch.no_grad()
    def test_timm_without_its_own_hidden_states(
        self, encoders: Callable[[str], FrozenEncoder], images: LabelledImages, tmp_path: Path
    ) -> None:
        encoder = encoders("timm")
        model = encoder.model.timm_model
        pixels = AutoImageProcessor.from_pretrained(encoder.name)(pictures(images))["pixel_values"]
        tokens = model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(
            model.patch_embed(pixels)))))  # fmt: skip
        readings = [Reading(8), Reading(8, "cls"), Reading(8, "head"), Reading(8, "tokens")]
        mean, cls, head, whole = read_features(encoder, images, readings, tmp_path, BATCH)
        close(mean, tokens[:, 1:].mean(dim=1))
        close(cls, tokens[:, 0])
        close(head, model.forward_head(model.norm(tokens), pre_logits=True))
        close(whole, tokens[:, 1:], 5e-3)

    def test_padding_of_images_is_no_feature(
        self, backbone_folders: dict[str, Path], tmp_path: Path, images: LabelledImages
    ) -> None:
        """The same patches in longer padding give the same features."""
        folder = shutil.copytree(backbone_folders["naflex"], tmp_path / "naflex")
        processor = AutoImageProcessor.from_pretrained(folder, max_num_patches=23)
        processor.save_pretrained(folder)
        encoder = FrozenEncoder.load(folder)
        readings = [Reading(8), Reading(8, "tokens"), Reading(8, "head")]
        mean, tokens, head = read_features(encoder, images, readings, tmp_path / "cache", BATCH)
        assert (mean.mask, head.mask) == (None, None)
        assert tokens.values.shape == (COUNT, 23, 32)
        for row, image in enumerate(pictures(images)):
            inputs = trim(processor([image], return_tensors="pt"))
            with torch.no_grad():
                output = encoder.model(**inputs, output_hidden_states=True)
            expected = output.hidden_states[-1][0].numpy()
            np.testing.assert_allclose(mean.values[row], expected.mean(axis=0), atol=1e-5)
            np.testing.assert_allclose(head.values[row], output.pooler_output[0], atol=1e-5)
            np.testing.assert_array_equal(tokens.mask[row], np.arange(23) < len(expected))
            inside = tokens.values[row][tokens.mask[row]]
            np.testing.assert_allclose(inside, expected, atol=5e-3)

    def test_layers_one_by_one_are_the_same(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path
    ) -> None:
        readings = [Reading(layer) for layer in range(1, 9)]
        together = read_features(clip, images, readings, tmp_path / "a", BATCH)
        for reading, expected in zip(readings, together, strict=True):
            (alone,) = read_features(clip, images, [reading], tmp_path / "b", BATCH)
            np.testing.assert_array_equal(alone.values, expected.values)

    @pytest.mark.parametrize("batch_size", [1, 4, 100])
    def test_batches_change_nothing(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path, batch_size: int
    ) -> None:
        (features,) = read_features(clip, images, [Reading(8)], tmp_path / "a", batch_size)
        (whole,) = read_features(clip, images, [Reading(8)], tmp_path / "b", COUNT)
        np.testing.assert_allclose(features.values, whole.values, atol=1e-5)

    def test_more_processes_change_nothing(
        self,
        encoders: Callable[[str], FrozenEncoder],
        images: LabelledImages,
        tmp_path: Path,
    ) -> None:
        readings = [Reading(8), Reading(8, "tokens")]
        naflex = encoders("naflex")
        one = read_features(naflex, images, readings, tmp_path / "a", BATCH, workers=1)
        two = read_features(naflex, images, readings, tmp_path / "b", BATCH, workers=2)
        for first, second in zip(one, two, strict=True):
            np.testing.assert_array_equal(first.values, second.values)
            np.testing.assert_array_equal(first.mask, second.mask)

    def test_reading_features_is_not_training(
        self,
        backbone_folders: dict[str, Path],
        encoders: Callable[[str], FrozenEncoder],
        images: LabelledImages,
        tmp_path: Path,
    ) -> None:
        # Dropout would show: the encoder must be in evaluation mode.
        model = AutoModel.from_pretrained(backbone_folders["vit"])
        model.config.hidden_dropout_prob = 0.5
        model.save_pretrained(tmp_path / "vit")
        AutoImageProcessor.from_pretrained(backbone_folders["vit"]).save_pretrained(
            tmp_path / "vit"
        )
        encoder = FrozenEncoder.load(tmp_path / "vit")
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
        (first,) = read_features(encoder, images, [Reading(8)], tmp_path / "a")
        (second,) = read_features(encoder, images, [Reading(8)], tmp_path / "b")
        np.testing.assert_array_equal(first.values, second.values)
        (plain,) = read_features(encoders("vit"), images, [Reading(8)], tmp_path / "c")
        np.testing.assert_allclose(first.values, plain.values, atol=1e-5)

    def test_bfloat16_is_near_and_kept_apart(
        self,
        backbone_folders: dict[str, Path],
        clip: FrozenEncoder,
        images: LabelledImages,
        tmp_path: Path,
    ) -> None:
        half = FrozenEncoder.load(backbone_folders["clip"], precision="bfloat16")
        (exact,) = read_features(clip, images, [Reading(8)], tmp_path)
        (rounded,) = read_features(half, images, [Reading(8)], tmp_path)
        assert rounded.values.dtype == np.float32
        assert len(entries(tmp_path)) == 2
        difference = np.abs(exact.values - rounded.values).max() / np.abs(exact.values).max()
        assert 1e-5 < difference < 0.03


def trim(images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the padding of one image."""
    used = int(images["pixel_attention_mask"].sum())
    assert used < images["pixel_attention_mask"].shape[1], "or there is nothing to show"
    return {n: v if n == "spatial_shapes" else v[:, :used] for n, v in images.items()}


class TestCache:
    def test_what_is_there_is_not_computed(
        self,
        backbone_folders: dict[str, Path],
        clip: FrozenEncoder,
        images: LabelledImages,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        readings = [Reading(8), Reading(2, "tokens")]
        first = read_features(clip, images, readings, tmp_path, BATCH)
        encoder = FrozenEncoder.load(backbone_folders["clip"])
        monkeypatch.setattr(encoder.model, "forward", never)
        monkeypatch.setattr(encoder, "pixels", never)
        again = read_features(encoder, images, [*readings[::-1], readings[0]], tmp_path, 1)
        for features, expected in zip(again, [*first[::-1], first[0]], strict=True):
            np.testing.assert_array_equal(features.values, expected.values)
        assert len(entries(tmp_path)) == 2
        with pytest.raises(AssertionError, match="not from the cache"):
            read_features(encoder, images, [*readings, Reading(3)], tmp_path)

    def test_only_what_is_missing_is_computed(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path
    ) -> None:
        read_features(clip, images, [Reading(8)], tmp_path)
        (before,) = entries(tmp_path)
        written = (tmp_path / before / "features.npy").stat().st_mtime_ns
        both = read_features(clip, images, [Reading(8), Reading(7)], tmp_path)
        assert len(entries(tmp_path)) == 2
        assert (tmp_path / before / "features.npy").stat().st_mtime_ns == written
        (alone,) = read_features(clip, images, [Reading(7)], tmp_path / "other")
        np.testing.assert_array_equal(both[1].values, alone.values)

    @pytest.mark.parametrize("family", ["clip", "timm", "naflex"])
    def test_the_same_encoder_elsewhere_is_the_same(
        self,
        family: str,
        backbone_folders: dict[str, Path],
        encoders: Callable[[str], FrozenEncoder],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        shutil.copytree(backbone_folders[family], tmp_path / "moved")
        monkeypatch.chdir(tmp_path)
        assert FrozenEncoder.load("moved").digest == encoders(family).digest

    @pytest.mark.parametrize("what", ["weight", "preprocessing", "configuration"])
    def test_another_encoder_has_its_own(
        self,
        what: str,
        backbone_folders: dict[str, Path],
        clip: FrozenEncoder,
        images: LabelledImages,
        tmp_path: Path,
    ) -> None:
        folder = shutil.copytree(backbone_folders["clip"], tmp_path / "clip")
        if what == "weight":
            weights = load_file(folder / "model.safetensors")
            name = next(name for name in weights if name.endswith("layers.7.mlp.fc2.bias"))
            weights[name][0] += 1e-3
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        elif what == "preprocessing":
            processor = AutoImageProcessor.from_pretrained(folder, image_mean=[0.4, 0.5, 0.5])
            processor.save_pretrained(folder)
        else:
            model = AutoModel.from_pretrained(folder)
            model.config.layer_norm_eps = 1e-3
            model.save_pretrained(folder)
        (first,) = read_features(clip, images, [Reading(8)], tmp_path / "cache")
        other = FrozenEncoder.load(folder)
        (second,) = read_features(other, images, [Reading(8)], tmp_path / "cache")
        assert len(entries(tmp_path / "cache")) == 2
        assert not np.array_equal(first.values, second.values)

    def test_other_images_or_another_reading_has_its_own(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path
    ) -> None:
        relabelled = LabelledImages(images.name, images.images, 1 - images.labels)
        for data in (images, noise(COUNT, seed=1), noise(COUNT - 1), relabelled):
            (features,) = read_features(clip, data, [Reading(8)], tmp_path)
            assert len(features.values) == len(data)
        assert len(entries(tmp_path)) == 4
        readings = [Reading(7), Reading(8, "cls"), Reading(8, keep_prefix=True)]
        read_features(clip, images, readings, tmp_path)
        assert len(entries(tmp_path)) == 7

    @pytest.mark.parametrize(
        ("failing", "error"), [(1, RuntimeError), (2, KeyboardInterrupt), (3, RuntimeError)]
    )
    def test_an_exception_leaves_nothing_behind(
        self,
        failing: int,
        error: type[BaseException],
        clip: FrozenEncoder,
        images: LabelledImages,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        readings = [Reading(8), Reading(8, "tokens")]
        read_features(clip, images, [Reading(1)], tmp_path)
        before = entries(tmp_path)
        forward, calls = clip.model.forward, []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == failing:
                raise error
            return forward(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(clip.model, "forward", interrupted)
            with pytest.raises(error):
                read_features(clip, images, readings, tmp_path, BATCH)
        assert (entries(tmp_path), leftovers(tmp_path)) == (before, [])
        again = read_features(clip, images, readings, tmp_path, BATCH)
        undisturbed = read_features(clip, images, readings, tmp_path / "other", BATCH)
        for first, second in zip(again, undisturbed, strict=True):
            np.testing.assert_array_equal(first.values, second.values)

    def test_another_process_and_its_end_by_kill(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path
    ) -> None:
        readings = [Reading(8), Reading(8, "tokens")]
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()

        def stop_half_way() -> None:
            forward, calls = clip.model.forward, []

            def waiting(*args: Any, **kwargs: Any) -> Any:
                calls.append(args)
                if len(calls) == 2:
                    there.send("half")
                    time.sleep(600)
                return forward(*args, **kwargs)

            clip.model.forward = waiting
            read_features(clip, images, readings, tmp_path, BATCH)

        process = context.Process(target=stop_half_way, daemon=True)
        process.start()
        try:
            assert here.poll(120)
            assert (entries(tmp_path), len(leftovers(tmp_path))) == ([], 2)
            text = message(lambda: read_features(clip, images, readings[:1], tmp_path, BATCH))
            assert text.startswith("another process computes features of")
            assert clip.name in text
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert entries(tmp_path) == []
        again = read_features(clip, images, readings, tmp_path, BATCH)
        assert (len(entries(tmp_path)), leftovers(tmp_path)) == (2, [])
        undisturbed = read_features(clip, images, readings, tmp_path / "other", BATCH)
        for first, second in zip(again, undisturbed, strict=True):
            np.testing.assert_array_equal(first.values, second.values)

    def test_other_data_need_not_wait(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path
    ) -> None:
        """Several sets are probed side by side."""
        other = from_bytes([encoded(np.zeros((8, 8, 3), np.uint8))], [0], "other train")
        names = set()
        for data in (images, other):
            read_features(clip, data, [Reading(8)], tmp_path)
            names = {path.name for path in tmp_path.glob(".*.lock")}
        assert len(names) == 2

    def test_another_process_that_has_just_ended(
        self,
        clip: FrozenEncoder,
        images: LabelledImages,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What it computed after this process looked, and before the lock was free, is taken."""

        def late(*args: Any) -> Any:
            monkeypatch.undo()
            read_features(clip, images, [Reading(8)], tmp_path)
            return module.acquire(*args)

        monkeypatch.setattr(module, "acquire", late)
        both = read_features(clip, images, [Reading(8), Reading(7)], tmp_path)
        assert [features.values.shape for features in both] == [(COUNT, 32)] * 2

    @pytest.mark.parametrize(("bad", "workers"), [(0, 1), (COUNT - 1, 1), (COUNT - 1, 2)])
    def test_a_corrupt_image(
        self, bad: int, workers: int, clip: FrozenEncoder, tmp_path: Path
    ) -> None:
        good = encoded(np.zeros((8, 8, 3), np.uint8))
        contents = [b"no image" if row == bad else good for row in range(COUNT)]
        data = from_bytes(contents, [0] * COUNT, "set train")
        text = message(lambda: read_features(clip, data, [Reading(8)], tmp_path, BATCH, workers))
        assert text.startswith(f"image {bad} (row {bad}) of set train cannot be read")
        assert (entries(tmp_path), leftovers(tmp_path)) == ([], [])

    @pytest.mark.parametrize(
        ("readings", "needed"),
        [
            ([Reading(8)], COUNT * 32 * 4),
            ([Reading(8, "tokens")], COUNT * 16 * 32 * 2),
            ([Reading(7), Reading(8)], 2 * COUNT * 32 * 4),
        ],
    )
    def test_a_disk_without_room(
        self,
        readings: list[Reading],
        needed: int,
        clip: FrozenEncoder,
        images: LabelledImages,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(free: int) -> None:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

        full(needed - 1)
        text = message(lambda: read_features(clip, images, readings, tmp_path, BATCH))
        assert f"features of {COUNT} images need" in text
        assert str(tmp_path) in text
        assert "cache=" in text
        assert (entries(tmp_path), leftovers(tmp_path)) == ([], [])
        full(needed)
        read_features(clip, images, readings, tmp_path, BATCH)

    def test_tokens_that_float16_cannot_hold(
        self, backbone_folders: dict[str, Path], images: LabelledImages, tmp_path: Path
    ) -> None:
        encoder = FrozenEncoder.load(backbone_folders["clip"])
        with torch.no_grad():
            encoder.blocks[7].mlp.fc2.bias[3] = 1e5
        text = message(lambda: read_features(encoder, images, [Reading(8, "tokens")], tmp_path))
        assert "too large for float16" in text
        assert (entries(tmp_path), leftovers(tmp_path)) == ([], [])
        (mean,) = read_features(encoder, images, [Reading(8)], tmp_path)
        assert mean.values[:, 3] == pytest.approx(1e5, rel=1e-3)


def test_weights_that_are_not_numbers(
    backbone_folders: dict[str, Path], images: LabelledImages, tmp_path: Path
) -> None:
    encoder = FrozenEncoder.load(backbone_folders["clip"])
    with torch.no_grad():
        encoder.blocks[0].mlp.fc2.bias[3] = torch.nan
    text = message(lambda: read_features(encoder, images, [Reading(8)], tmp_path))
    assert "are not finite; check its weights" in text
    assert "float16" not in text


def test_registers_are_no_class_token(backbone_folders: dict[str, Path]) -> None:
    encoder = FrozenEncoder.load(backbone_folders["dinov3"])
    encoder.check(Reading(8, "cls"))
    encoder.model.embeddings.cls_token = None
    assert encoder.prefix_tokens == 5
    assert "has no class token" in message(lambda: encoder.check(Reading(8, "cls")))


def test_a_classifier_has_no_pooler(
    backbone_folders: dict[str, Path], images: LabelledImages, tmp_path: Path
) -> None:
    """As google/vit-base-patch16-224 comes; probes read its tokens all the same."""
    whole = AutoModel.from_pretrained(backbone_folders["vit"])
    classifier = ViTForImageClassification(whole.config)
    classifier.vit.load_state_dict(whole.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path / "vit")
    AutoImageProcessor.from_pretrained(backbone_folders["vit"]).save_pretrained(tmp_path / "vit")
    encoder = FrozenEncoder.load(tmp_path / "vit")
    readings = [Reading(8), Reading(8, "cls")]
    found = read_features(encoder, images, readings, tmp_path / "a")
    plain = FrozenEncoder.load(backbone_folders["vit"])
    for one, other in zip(
        found, read_features(plain, images, readings, tmp_path / "b"), strict=True
    ):
        np.testing.assert_array_equal(one.values, other.values)
    head = message(lambda: read_features(encoder, images, [Reading(8, "head")], tmp_path / "c"))
    assert "has none; use pooling=mean" in head


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("not from the cache")


class TestRefusals:
    @pytest.mark.parametrize("given", [0, 9, -1])
    def test_no_such_layer(self, clip: FrozenEncoder, given: int) -> None:
        text = message(lambda: clip.layer(given))
        assert f"layer is {given}" in text
        assert "layers 1 to 8" in text
        message(lambda: clip.check(Reading(given)))

    def test_names_of_layers(self, clip: FrozenEncoder) -> None:
        assert [clip.layer(name) for name in ("last", "penultimate", 1, 8)] == [8, 7, 1, 8]

    @pytest.mark.parametrize("family", ["siglip", "aimv2", "naflex"])
    def test_no_class_token(
        self, family: str, encoders: Callable[[str], FrozenEncoder], images: LabelledImages
    ) -> None:
        text = message(lambda: encoders(family).check(Reading(8, "cls")))
        assert "has no class token; use pooling=mean" in text

    def test_the_head_reads_the_last_layer(
        self, clip: FrozenEncoder, images: LabelledImages, tmp_path: Path
    ) -> None:
        text = message(lambda: read_features(clip, images, [Reading(7, "head")], tmp_path / "c"))
        assert "layer is 7" in text
        assert "layer=last" in text
        assert not (tmp_path / "c").exists(), "refused before anything is done"

    def test_no_pooling_head(
        self, backbone_folders: dict[str, Path], images: LabelledImages, tmp_path: Path
    ) -> None:
        model = AutoModel.from_pretrained(backbone_folders["siglip"], vision_use_head=False)
        processor = AutoImageProcessor.from_pretrained(backbone_folders["siglip"])
        encoder = FrozenEncoder("headless", model, processor)
        readings = [Reading(8), Reading(8, "head")]
        text = message(lambda: read_features(encoder, images, readings, tmp_path))
        assert text == "pooling is head but 'headless' has none; use pooling=mean"
        assert (entries(tmp_path), leftovers(tmp_path)) == ([], [])

    def test_no_such_encoder(self, tmp_path: Path) -> None:
        assert "nowhere" in message(lambda: FrozenEncoder.load(tmp_path / "nowhere"))

    def test_no_image_processor(self, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(backbone_folders["clip"], tmp_path / "clip")
        (folder / "preprocessor_config.json").unlink()
        text = message(lambda: FrozenEncoder.load(folder))
        assert f"'{folder}' has no image processor (preprocessor_config.json)" in text
