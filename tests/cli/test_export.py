"""hive-vision export: from a run, a stage, an encoder folder; one line for mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from hive_vision.cli import main
from hive_vision.folders import check_folder, seal
from hive_vision.models.backbones import load_vision_model
from hive_vision.models.export import export_encoder
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor, load_image_processor
from hive_vision.models.self_attention_baseline import (
    SelfAttentionForConditionalGeneration,
    image_token_id,
)
from hive_vision.training.checkpoints import save_stage_model
from tests.cli.helpers import failure
from tests.models.dual_encoders import write_dual_encoder
from tests.models.helpers import add_noise, images


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "siglip"
    write_dual_encoder("siglip", folder)
    return folder


@pytest.fixture(scope="module")
def run(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves, as far as it matters here."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    model = load_vision_model(full)
    add_noise(model, 0.1)
    facts = {"method": "hive", "vision": str(full), "version": "0"}
    export_encoder(model, load_image_processor(full), folder / "encoder", "# Card\n", facts)
    return folder


@pytest.fixture(scope="module", params=["hive", "sa"])
def stage(
    request: pytest.FixtureRequest,
    full: Path,
    backbone_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The model that a stage of either kind of method hands on."""
    folder = tmp_path_factory.mktemp("stage") / "model"
    sources = (full, backbone_folders["llama"])
    processor = HiveProcessor.from_backbones(*sources)
    model: PreTrainedModel
    if request.param == "sa":
        token = image_token_id(processor.tokenizer)
        model = SelfAttentionForConditionalGeneration.from_backbones(*sources, image_token_id=token)
    else:
        model = HiveForConditionalGeneration.from_backbones(*sources)
    add_noise(model, 0.05)
    facts = {"method": request.param, "vision": str(full), "stage": "stage1"}
    save_stage_model(model, model.state_dict(), processor, folder, facts)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("inside", ["", "encoder"])
def test_a_run_and_its_encoder(
    inside: str, run: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run / inside), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"encoder: {tmp_path / 'out'}\n"
    assert_equal(weights(tmp_path / "out"), weights(run / "encoder"))
    facts = check_folder(tmp_path / "out", "encoder")
    assert facts["method"] == "hive"
    assert facts["vision"] == str(full)
    assert facts["encoder"] == str(run / inside)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "method `hive`" in card
    assert f"Exported from `{run / inside}`" in card


def test_the_model_of_a_stage(stage: Path, tmp_path: Path) -> None:
    main(["export", str(stage), "--output", str(tmp_path / "out")])
    method = check_folder(tmp_path / "out", "encoder")["method"]
    if method == "sa":
        model = SelfAttentionForConditionalGeneration.from_pretrained(stage).model.vision_tower
    else:
        model = HiveForConditionalGeneration.from_pretrained(stage).vision_model
    assert_equal(weights(tmp_path / "out"), model.state_dict())


@torch.no_grad()
def test_into_the_full_model(
    run: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run), "--output", str(tmp_path / "out"), "--into", str(full)])
    assert "measure zero-shot accuracy" in capsys.readouterr().out
    new = AutoModel.from_pretrained(tmp_path / "out").eval()
    old = AutoModel.from_pretrained(full).eval()
    assert_equal(new.text_model.state_dict(), old.text_model.state_dict())
    encoder = AutoModel.from_pretrained(run / "encoder").eval()
    expected = encoder(images(2)).pooler_output
    assert torch.equal(new.get_image_features(images(2)).pooler_output, expected)
    facts = check_folder(tmp_path / "out", "dual_encoder")
    assert (facts["full_model"], facts["method"]) == (str(full), "hive")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Measure zero-shot accuracy" in card
    # And out again.
    main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert_equal(weights(tmp_path / "again"), encoder.state_dict())


@pytest.mark.parametrize(
    ("base", "alpha"), [("recorded", 0.25), ("full", 0.25), ("full", 0), ("given", 1)]
)
def test_between_base_and_trained(
    base: str, alpha: float, run: Path, full: Path, tmp_path: Path
) -> None:
    """The base is BASE, else FULL_MODEL, else what the run says; only one of them exists."""
    encoder = shutil.copytree(run / "encoder", tmp_path / "encoder")
    facts = {"method": "hive"} | ({"vision": str(full)} if base == "recorded" else {})
    (encoder / "manifest.json").unlink()
    seal(encoder, "encoder", **facts)
    options = {"recorded": [], "full": ["--into", str(full)], "given": ["--base", str(full)]}
    output = tmp_path / "out"
    main(["export", str(encoder), f"--output={output}", f"--interpolate={alpha}", *options[base]])
    before, after = load_vision_model(full).state_dict(), weights(encoder)
    for name, weight in load_vision_model(output).state_dict().items():
        expected = (1 - alpha) * before[name] + alpha * after[name]
        assert torch.equal(weight, expected), name
    manifest = check_folder(output, "dual_encoder" if base == "full" else "encoder")
    assert (manifest["alpha"], manifest["base"]) == (alpha, str(full))
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"alpha = {alpha}" in card
    assert str(full) in card


def test_base_comes_before_the_full_model(run: Path, full: Path, tmp_path: Path) -> None:
    write_dual_encoder("siglip", tmp_path / "other", seed=7)
    argv = ["export", str(run), "--output", str(tmp_path / "out"), "--into", str(full)]
    main([*argv, "--interpolate", "0", "--base", str(tmp_path / "other")])
    expected = load_vision_model(tmp_path / "other").state_dict()
    assert_equal(load_vision_model(tmp_path / "out").state_dict(), expected)


def test_an_encoder_of_others(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(backbone_folders["dinov2"], tmp_path / "dinov2")
    (source / "manifest.json").write_text("[]")  # a file of that name that is not ours
    main(["export", str(source), "--output", str(tmp_path / "out")])
    assert_equal(weights(tmp_path / "out"), weights(source))
    assert "method" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", "--help"])
    text = capsys.readouterr().out
    for word in ("ENCODER", "--output", "--into", "--interpolate", "--base", "zero-shot"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


class TestMistakes:
    def fails(self, capsys: pytest.CaptureFixture[str], output: Path, *argv: object) -> str:
        line = failure(capsys, "export", *map(str, argv), "--output", str(output))
        assert not output.exists()
        assert not list(output.parent.glob(".*"))
        return line

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["x"], "required: --output"),
            (["--output", "y"], "required: ENCODER"),
            (["x", "--output", "y", "--inter", "0.5"], "unrecognized arguments: --inter"),
            (["x", "--output", "y", "--interpolate", "half"], "invalid float value: 'half'"),
            (["x", "--output", "y", "--interpolate", "1.5"], "it must be from 0"),
            (["x", "--output", "y", "--interpolate", "nan"], "it must be from 0"),
            (["x", "--output", "y", "--base", "z"], "--base is used by --interpolate"),
        ],
    )
    def test_arguments(
        self, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert words in failure(capsys, "export", *argv)

    def test_an_output_that_exists_is_not_replaced(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "photo").touch()
        line = failure(capsys, "export", str(run), "--output", str(tmp_path))
        assert "exists already" in line
        assert [path.name for path in tmp_path.iterdir()] == ["photo"]

    def test_nothing_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "nowhere" in self.fails(capsys, tmp_path / "out", tmp_path / "nowhere")

    def test_a_run_that_is_not_finished(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "recipe.yaml").touch()
        line = self.fails(capsys, tmp_path / "out", tmp_path / "x")
        assert "has no encoder yet" in line
        assert "stage1/model" in line

    @pytest.mark.parametrize("kind", ["checkpoint", "data"])
    def test_another_kind_of_folder(
        self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x").mkdir()
        seal(tmp_path / "x", kind)
        assert f"is a {kind} folder" in self.fails(capsys, tmp_path / "out", tmp_path / "x")

    def test_an_encoder_with_other_bytes_than_were_written(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = shutil.copytree(run / "encoder", tmp_path / "copy")
        config = json.loads((copy / "config.json").read_text()) | {"attention_dropout": 0.5}
        (copy / "config.json").write_text(json.dumps(config))
        assert "config.json" in self.fails(capsys, tmp_path / "out", copy)

    def test_no_base(self, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = self.fails(capsys, tmp_path / "out", full, "--interpolate", 0.5)
        assert "does not say what its training started from" in line
        assert "--base" in line

    def test_a_base_that_has_gone(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = shutil.copytree(run / "encoder", tmp_path / "copy")
        (copy / "manifest.json").unlink()
        seal(copy, "encoder", method="hive", vision="gone/away")
        line = self.fails(capsys, tmp_path / "out", copy, "--interpolate", 0.5)
        assert "started from 'gone/away'" in line
        assert "--base" in line

    def test_into_what_it_does_not_belong(
        self,
        run: Path,
        backbone_folders: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write_dual_encoder("clip", tmp_path / "clip")
        line = self.fails(capsys, tmp_path / "out", run, "--into", tmp_path / "clip")
        assert "SiglipVisionModel" in line
        single = backbone_folders["siglip"]
        line = self.fails(capsys, tmp_path / "out", run, "--into", single)
        assert "is no dual encoder" in line
