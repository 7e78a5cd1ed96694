"""From an encoder and a classification set to a result that says what it was found with."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_vision.data.classification import (
    ClassificationSet,
    ClassificationSource,
    load_classification_set,
)
from hive_vision.data.parallel import processors
from hive_vision.evaluation.arguments import FastProtocol, PaperProtocol, ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder, Reading, read_features
from hive_vision.evaluation.paper_protocol import probe_paper
from hive_vision.evaluation.probe import (
    ProbeResult,
    attention_heads,
    feature_cache,
    probe_encoder,
    worker_count,
)
from hive_vision.evaluation.probing import LabelledFeatures, probe_fast, probe_neighbours
from hive_vision.models.probes import AttentiveProbe, LinearProbe
from tests.data.test_classification import REAL, real_splits, write_parquet
from tests.evaluation.helpers import colour_set

QUICK = FastProtocol(
    inverse_penalties=(0.1, 1.0), learning_rates=(3e-3,), weight_decays=(0.01,), min_steps=20,
    epochs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(backbone_folders: dict[str, Path]) -> FrozenEncoder:
    return FrozenEncoder.load(backbone_folders["clip"])


@pytest.fixture(scope="module")
def data() -> ClassificationSet:
    return colour_set(30, 27, spread=120)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def arguments(cache: Path) -> ProbeArguments:
    return ProbeArguments(cache=str(cache), fast=QUICK, seeds=(0, 1), neighbours=3)


def labelled(
    encoder: FrozenEncoder, data: ClassificationSet, cache: Path, reading: Reading
) -> list[LabelledFeatures]:
    return [
        LabelledFeatures(read_features(encoder, part, [reading], cache)[0], part.labels)
        for part in (data.train, data.test)
    ]


results = st.builds(
    lambda seeds, images, bits, chosen: ProbeResult(
        "encoders/mine",
        "cifar10",
        np.random.default_rng(bits).random((max(1, len(seeds)), images)) < 0.7,
        tuple(seeds),
        {"probe": "linear", "inverse_penalties": [0.1, 1.0], "data": {"source": "é"}},
        tuple({"inverse_penalty": c} for c in chosen),
    ),
    st.lists(st.integers(0, 2**31), max_size=4, unique=True),
    st.integers(1, 40),
    st.integers(0, 99),
    st.lists(st.floats(1e-4, 1e4), max_size=4),
)


class TestResult:
    @settings(max_examples=40, deadline=None)
    @given(result=results)
    def test_survives_a_file(self, result: ProbeResult) -> None:
        again = ProbeResult.from_json(json.loads(json.dumps(result.to_json())))
        assert again.correct.dtype == bool
        np.testing.assert_array_equal(again.correct, result.correct)
        for name in ("encoder", "data", "seeds", "settings", "chosen", "accuracy"):
            assert getattr(again, name) == getattr(result, name)
        assert again.to_json() == result.to_json()

    def test_numbers(self) -> None:
        correct = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0]], dtype=bool)
        content = ProbeResult("e", "d", correct, (4, 7, 9), {}).to_json()
        assert content["mean"] == pytest.approx(0.6)
        assert content["deviation"] == pytest.approx(0.2)
        assert content["by_seed"] == pytest.approx({"4": 0.6, "7": 0.4, "9": 0.8})
        assert (content["seeds"], content["images"]) == (3, 5)
        by_image = [1, 2 / 3, 1 / 3, 1, 0]
        error = (sum((share - 0.6) ** 2 for share in by_image) / 4 / 5) ** 0.5
        assert content["image_error"] == pytest.approx(error)

    def test_numbers_without_seeds(self) -> None:
        correct = np.array([[1, 1, 0, 1]], dtype=bool)
        result = ProbeResult("e", "d", correct, (), {})
        content = result.to_json()
        assert (content["deviation"], content["by_seed"]) == (None, {})
        assert result.accuracy.spread == content["image_error"] == pytest.approx(0.25)
        assert (content["seeds"], content["images"]) == (1, 4)

    def test_bits_are_in_the_order_of_the_images(self) -> None:
        correct = np.zeros((1, 10), bool)
        correct[0, [0, 9]] = True
        assert ProbeResult("e", "d", correct, (), {}).to_json()["correct"] == ["8040"]


class TestProbes:
    @pytest.mark.parametrize(
        ("options", "reading"),
        [
            ({}, Reading(8)),
            ({"layer": "penultimate"}, Reading(7)),
            ({"layer": 2, "keep_prefix": True}, Reading(2, keep_prefix=True)),
            ({"layer": 5, "pooling": "cls"}, Reading(5, "cls")),
            ({"pooling": "head"}, Reading(8, "head")),
        ],
    )
    def test_knn_and_linear_read_what_they_are_told(
        self,
        options: dict[str, Any],
        reading: Reading,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        cache: Path,
        arguments: ProbeArguments,
    ) -> None:
        train, test = labelled(encoder, data, cache, reading)
        arguments = replace(arguments, **options)
        found = probe_encoder(encoder, data, replace(arguments, probe="knn"))
        expected = probe_neighbours(train, test, 3)
        np.testing.assert_array_equal(found.correct, expected.correct)
        assert (found.seeds, found.chosen) == ((), ())
        found = probe_encoder(encoder, data, arguments)
        expected = probe_fast(train, test, 3, QUICK, (0, 1))
        np.testing.assert_array_equal(found.correct, expected.correct)
        assert (found.seeds, found.chosen) == ((0, 1), expected.chosen)
        facts = {"layer": reading.layer, "depth": 8, "pooling": reading.pooling}
        assert facts.items() <= found.settings.items()
        assert found.settings["keep_prefix"] == reading.keep_prefix

    @pytest.mark.parametrize("keep_prefix", [False, True])
    def test_attentive_reads_all_tokens(
        self,
        keep_prefix: bool,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        cache: Path,
        arguments: ProbeArguments,
    ) -> None:
        reading = Reading(7, "tokens", keep_prefix)
        train, test = labelled(encoder, data, cache, reading)
        expected = probe_fast(train, test, 3, QUICK, (0, 1), heads=4)
        options = {"probe": "attentive", "layer": 7, "keep_prefix": keep_prefix}
        found = probe_encoder(encoder, data, replace(arguments, **options))
        np.testing.assert_array_equal(found.correct, expected.correct)
        assert found.chosen == expected.chosen

    @pytest.mark.parametrize(
        ("probe", "pooling", "reading", "make"),
        [
            ("linear", "cls", Reading(8, "tokens", True), partial(LinearProbe, pooling="cls")),
            ("linear", "head", Reading(8, "head"), LinearProbe),
            ("attentive", "mean", Reading(8, "tokens"), partial(AttentiveProbe, heads=4)),
        ],
        ids=["cls", "head", "attentive"],
    )
    def test_paper_pools_behind_its_norm(
        self,
        probe: str,
        pooling: str,
        reading: Reading,
        make: Any,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        arguments: ProbeArguments,
        tmp_path: Path,
    ) -> None:
        paper = PaperProtocol(2e-2, batch_size=10, micro_batch_size=10, epochs=1, warmup_epochs=0)
        options = {"protocol": "paper", "pooling": pooling, "paper": paper, "seeds": (3,)}
        found = probe_encoder(encoder, data, replace(arguments, probe=probe, **options))
        assert (found.correct.shape, found.seeds, found.chosen) == ((1, 27), (3,), ())
        head = partial(make, 32, 3)
        expected = probe_paper(encoder, reading, data, head, paper, (3,), tmp_path / "work", 1)
        np.testing.assert_array_equal(found.correct, expected.correct)
        assert asdict(paper).items() <= found.settings.items()
        recorded = "tokens" if probe == "attentive" else pooling
        assert (found.settings["protocol"], found.settings["pooling"]) == ("paper", recorded)

    def test_all_settings_are_recorded(
        self, encoder: FrozenEncoder, data: ClassificationSet, arguments: ProbeArguments
    ) -> None:
        result = probe_encoder(encoder, data, arguments)
        assert (result.encoder, result.data) == (encoder.name, "colours")
        assert result.settings == {
            "probe": "linear",
            "protocol": "fast",
            "layer": 8,
            "depth": 8,
            "pooling": "mean",
            "keep_prefix": False,
            "precision": "float32",
            "data": {"source": "memory"},
            "train_images": 30,
            "test_images": 27,
            "classes": 3,
            **asdict(QUICK),
        }
        knn = probe_encoder(encoder, data, replace(arguments, probe="knn"))
        assert knn.settings["neighbours"] == 3
        assert "protocol" not in knn.settings, "nothing is trained"
        written = json.loads(json.dumps(result.to_json()))
        assert written["settings"]["learning_rates"] == [3e-3]

    def test_features_are_kept(
        self, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        arguments = ProbeArguments(probe="knn", cache=str(tmp_path / "kept"), num_workers=0)
        first = probe_encoder(encoder, data, arguments)
        stored = sorted((tmp_path / "kept").rglob("features.npy"))
        assert len(stored) == 2
        times = [path.stat().st_mtime_ns for path in stored]
        second = probe_encoder(encoder, data, replace(arguments, neighbours=7))
        assert times == [path.stat().st_mtime_ns for path in stored]
        assert second.settings["neighbours"] == 7
        assert first.correct.shape == second.correct.shape


class TestDefaults:
    def test_numbers(self) -> None:
        arguments = ProbeArguments()
        assert (arguments.probe, arguments.protocol) == ("linear", "fast")
        assert (arguments.layer, arguments.pooling, arguments.keep_prefix) == (
            "last",
            "mean",
            False,
        )
        assert (arguments.seeds, arguments.neighbours) == ((0, 1, 2), 5)
        assert arguments.precision == "float32"

    def test_place_of_features(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert feature_cache(ProbeArguments()) == tmp_path / ".cache/hive-vision/features"
        assert feature_cache(ProbeArguments(cache="~/kept")) == tmp_path / "kept"
        assert feature_cache(ProbeArguments(cache="kept")) == Path("kept")

    @pytest.mark.parametrize(("given", "expected"), [(0, 1), (1, 1), (3, 3)])
    def test_workers(self, given: int, expected: int) -> None:
        assert worker_count(ProbeArguments(num_workers=given)) == expected
        assert 1 <= worker_count(ProbeArguments()) <= max(1, processors())

    def test_heads_are_those_of_the_encoder(self, encoder: FrozenEncoder) -> None:
        assert attention_heads(encoder) == 4
        silent = SimpleNamespace(config=SimpleNamespace())  # as timm's configurations
        for width, heads in ((32, 1), (200, 3), (768, 12)):
            assert attention_heads(SimpleNamespace(model=silent, width=width)) == heads


@pytest.mark.parametrize("name", REAL)
def test_the_eight_sets(
    name: str, encoder: FrozenEncoder, arguments: ProbeArguments, tmp_path: Path
) -> None:
    """A local copy in the columns, types and splits of the hub's."""
    folder = write_parquet(tmp_path / name, real_splits(REAL[name]))
    data = load_classification_set(ClassificationSource(f"{name}:{folder}"))
    result = probe_encoder(encoder, data, replace(arguments, probe="knn", neighbours=1))
    assert (result.data, result.correct.shape) == (
        name,
        (1, len(REAL[name].splits[REAL[name].test])),
    )
    assert result.settings["classes"] == REAL[name].classes


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"layer": 9}, "layer is 9"),
            ({"layer": 0, "probe": "attentive"}, "layer is 0"),
            ({"pooling": "head", "layer": "penultimate"}, "pooling head reads the last layer"),
            ({"probe": "knn", "neighbours": 31}, "neighbours is 31; there are 30 training images"),
            ({"probe": "zero_shot"}, "probe is zero_shot, which judges a whole CLIP or SigLIP"),
            ({"probe": "retrieval"}, "probe is retrieval, which judges a whole CLIP or SigLIP"),
        ],
    )
    def test_one_line(
        self,
        options: dict[str, Any],
        text: str,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        arguments: ProbeArguments,
    ) -> None:
        with pytest.raises(ValueError, match=text) as failure:
            probe_encoder(encoder, data, replace(arguments, **options))
        assert "\n" not in str(failure.value)

    def test_no_class_token(
        self,
        backbone_folders: dict[str, Path],
        data: ClassificationSet,
        arguments: ProbeArguments,
    ) -> None:
        encoder = FrozenEncoder.load(backbone_folders["siglip"])
        for protocol in ("fast", "paper"):
            options = {"pooling": "cls", "protocol": protocol}
            with pytest.raises(ValueError, match="has no class token; use pooling=mean"):
                probe_encoder(encoder, data, replace(arguments, **options))
