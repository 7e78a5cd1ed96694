"""Comparisons of encoders: dispatch, layers in one pass, zero-shot, retrieval, interpolation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hive_vision.data.classification import ClassificationSource, load_classification_set
from hive_vision.evaluation.arguments import ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder
from hive_vision.evaluation.probe import probe_encoder
from hive_vision.studies.probe import (
    compare_encoders,
    load_sets,
    probe_between,
    probe_layers,
)
from tests.evaluation.helpers import write_colours
from tests.models.dual_encoders import write_dual_encoder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_colours(tmp_path_factory.mktemp("sets") / "colours"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "siglip"
    write_dual_encoder("siglip", folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, whole: str) -> str:
    """The vision half of another whole model: what training could have made of it."""
    folder = tmp_path_factory.mktemp("models") / "other"
    write_dual_encoder("siglip", folder, seed=1)
    return str(folder)


@pytest.fixture
def arguments(tmp_path: Path) -> ProbeArguments:
    return ProbeArguments(cache=str(tmp_path / "cache"), seeds=(0, 1))


def test_each_encoder_on_each_set(
    backbone_folders: dict[str, Path], colours: str, arguments: ProbeArguments
) -> None:
    encoders = {"first": str(backbone_folders["siglip"]), "second": str(backbone_folders["clip"])}
    results = compare_encoders(encoders, [colours], arguments)
    assert {method: list(by_set) for method, by_set in results.items()} == {
        "first": ["colours"],
        "second": ["colours"],
    }
    (data,) = load_sets([colours], arguments)
    for method, folder in encoders.items():
        alone = probe_encoder(FrozenEncoder.load(folder), data, arguments)
        np.testing.assert_array_equal(results[method]["colours"].correct, alone.correct)


def test_layers_are_those_that_are_read_one_by_one(
    backbone_folders: dict[str, Path], colours: str, arguments: ProbeArguments
) -> None:
    folder = str(backbone_folders["siglip"])
    (data,) = load_sets([colours], arguments)
    found = probe_layers({"base": folder}, data, arguments)
    encoder = FrozenEncoder.load(folder)
    assert len(found["base"]) == encoder.depth
    elsewhere = replace(arguments, cache=f"{arguments.cache}-2")
    for layer in (1, encoder.depth):
        alone = probe_encoder(encoder, data, replace(elsewhere, layer=layer))
        np.testing.assert_array_equal(found["base"][layer - 1].correct, alone.correct)
        assert found["base"][layer - 1].settings["layer"] == layer


@pytest.mark.parametrize(
    "options", [{"pooling": "head"}, {"protocol": "paper"}, {"probe": "zero_shot"}]
)
def test_what_layers_are_not_probed_with(
    options: dict[str, str], colours: str, arguments: ProbeArguments
) -> None:
    with pytest.raises(ValueError, match="layers are probed with probe=linear"):
        probe_layers(
            {},
            load_classification_set(ClassificationSource(colours)),
            replace(arguments, **options),
        )


def test_two_sets_of_one_name(tmp_path: Path, arguments: ProbeArguments) -> None:
    names = [str(write_colours(tmp_path / part / "same")) for part in ("a", "b")]
    with pytest.raises(ValueError, match="two data sets are called 'same'"):
        load_sets(names, arguments)


def test_zero_shot_before_and_after(
    whole: str, trained: str, colours: str, arguments: ProbeArguments
) -> None:
    arguments = replace(arguments, probe="zero_shot", templates=("a {}",))
    results = compare_encoders({"before": whole, "after": trained}, [colours], arguments)
    result = results["before"]["colours"]
    assert result.correct.shape[0] == 1
    assert result.seeds == ()
    assert result.settings["templates"] == ["a {}"]


def test_retrieval_has_a_row_for_each_direction_and_k(
    whole: str, image_folder: Path, arguments: ProbeArguments
) -> None:
    results = compare_encoders(
        {"a": whole}, [str(image_folder)], replace(arguments, probe="retrieval")
    )
    rows = results["a"]
    name = image_folder.name
    assert list(rows) == [
        f"{name} {direction} R@{k}"
        for direction in ("image to text", "text to image")
        for k in (1, 5, 10)
    ]
    for direction in ("image to text", "text to image"):
        at = [rows[f"{name} {direction} R@{k}"].accuracy.mean for k in (1, 5, 10)]
        assert at == sorted(at)


def test_between_two_encoders(
    whole: str, trained: str, colours: str, arguments: ProbeArguments
) -> None:
    found = probe_between(whole, trained, [0, 0.5, 1], [colours], arguments)
    kinds = found["colours"]
    assert list(kinds) == ["linear", "zero_shot"]
    ends = {0: whole, 2: trained}
    for place, folder in ends.items():
        alone = compare_encoders({"x": folder}, [colours], arguments)["x"]["colours"]
        np.testing.assert_array_equal(kinds["linear"][place].correct, alone.correct)
    zero_shot = replace(arguments, probe="zero_shot")
    before = compare_encoders({"x": whole}, [colours], zero_shot)["x"]["colours"]
    np.testing.assert_array_equal(kinds["zero_shot"][0].correct, before.correct)


def test_between_encoders_on_a_set_without_class_names(
    whole: str,
    trained: str,
    colours: str,
    arguments: ProbeArguments,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The probe's curve is not lost over the other one's."""
    sets = [replace(data, class_names=()) for data in load_sets([colours], arguments)]
    monkeypatch.setattr("hive_vision.studies.probe.load_sets", lambda *_: sets)
    found = probe_between(whole, trained, [0.5], [colours], arguments)
    assert list(found["colours"]) == ["linear"]
    assert "no zero-shot accuracy on colours: no class names" in caplog.text


@pytest.mark.parametrize("probe", ["zero_shot", "retrieval"])
def test_between_encoders_the_whole_model_comes_by_itself(
    probe: str, whole: str, trained: str, colours: str, arguments: ProbeArguments
) -> None:
    with pytest.raises(ValueError, match=f"probe is {probe}, but between encoders"):
        probe_between(whole, trained, [0.5], [colours], replace(arguments, probe=probe))


def test_retrieval_from_two_folders_of_one_name(
    whole: str, tmp_path: Path, arguments: ProbeArguments
) -> None:
    names = [str(tmp_path / part / "validation") for part in ("a", "b")]
    with pytest.raises(ValueError, match="two data sets are called 'validation'"):
        compare_encoders({"a": whole}, names, replace(arguments, probe="retrieval"))


def test_between_encoders_without_a_text_half(
    backbone_folders: dict[str, Path], colours: str, arguments: ProbeArguments
) -> None:
    folder = str(backbone_folders["dinov2"])
    found = probe_between(folder, folder, [0.5], [colours], arguments)
    assert list(found["colours"]) == ["linear"]
