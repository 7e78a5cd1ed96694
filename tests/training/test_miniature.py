"""The miniature is built once, of the settings asked for, and completed where it is not."""

from dataclasses import replace

import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hive_vision.data.miniature import MiniatureData
from hive_vision.training import miniature
from hive_vision.training.foundations import Foundations
from hive_vision.training.miniature import MiniatureSettings, ensure_miniature, ensure_vlm_data

DATA = MiniatureData(
    train_scenes=48,
    validation_scenes=4,
    classification_train=4,
    classification_test=4,
    image_size=24,
)
UNTRAINED = Foundations(
    vision_layers=2,
    vision_hidden_size=16,
    vision_steps=0,
    language_layers=2,
    language_hidden_size=32,
    language_steps=0,
    batch_size=16,
)


@pytest.fixture
def settings(tmp_path):
    return MiniatureSettings(str(tmp_path / "miniature"), DATA, UNTRAINED)


def test_builds_once(settings):
    folder = ensure_miniature(settings)
    assert (folder / "data" / "captions" / "train" / "metadata.jsonl").is_file()
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert ensure_miniature(settings) == folder
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert AutoModel.from_pretrained(folder / "foundations" / "siglip")
    assert AutoModelForCausalLM.from_pretrained(folder / "foundations" / "llama")


def test_builds_what_is_missing(settings, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(miniature, "train_foundations", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_miniature(settings)
    monkeypatch.setattr(miniature, "build_miniature_data", interrupt)
    assert (ensure_miniature(settings) / "foundations" / "llama").is_dir()


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"data": replace(DATA, train_scenes=49)}, "data.train_scenes=48"),
        ({"foundations": replace(UNTRAINED, seed=1)}, "foundations.seed=0"),
    ],
)
def test_other_settings_are_refused(settings, other, key):
    ensure_miniature(settings)
    with pytest.raises(ValueError, match=rf"was built with {key}, but .* delete the folder"):
        ensure_miniature(replace(settings, **other))


def test_a_file_is_refused(settings, tmp_path):
    (tmp_path / "miniature").write_text("")
    with pytest.raises(ValueError, match="is a file: choose another folder"):
        ensure_miniature(settings)


def test_a_foreign_folder_is_refused(settings, tmp_path):
    (tmp_path / "miniature").mkdir()
    (tmp_path / "miniature" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds files but no miniature"):
        ensure_miniature(settings)


def test_vlm_data_is_completed(settings):
    folder = ensure_vlm_data(settings)
    assert (folder / "vlm" / "captions.json").is_file()
    language = folder / "foundations" / "llama-instruct"
    assert AutoModelForCausalLM.from_pretrained(language)
    # It has read the questions, so their words are tokens; it was not shown where pictures stand.
    tokens = AutoTokenizer.from_pretrained(language).tokenize("USER: what colour is the 3?")
    assert "\u0120colour" in tokens
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert ensure_vlm_data(settings) == folder
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_questions_of_another_version_are_refused(settings):
    folder = ensure_vlm_data(settings)
    kept = folder / "vlm" / "settings.json"
    kept.write_text(kept.read_text().replace("400", "401"))
    with pytest.raises(ValueError, match=r"questions of another version .*: delete it and .*llama"):
        ensure_vlm_data(settings)
    kept.unlink()
    with pytest.raises(ValueError, match="questions of another version"):
        ensure_vlm_data(settings)
