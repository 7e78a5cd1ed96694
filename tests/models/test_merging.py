"""Encoders back in their dual encoders, and between two encoders, against plain transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from hive_vision.folders import check_folder
from hive_vision.models.backbones import load_vision_model
from hive_vision.models.export import noise_features
from hive_vision.models.merging import (
    dual_encoder_card,
    export_dual_encoder,
    interpolate_encoders,
    load_dual_encoder,
    load_processor,
    replace_vision_half,
)
from hive_vision.models.processing import load_image_processor
from tests.conftest import PATCH_SIZE
from tests.data.helpers import picture
from tests.models.dual_encoders import FAMILIES, MAX_TOKENS, write_dual_encoder
from tests.models.helpers import add_noise

TEXTS = ["a photo of a Red circle.", "two", "a small green square and a star"]


@pytest.fixture(scope="module")
def duals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("duals")
    for family in FAMILIES:
        write_dual_encoder(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def merged(duals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merged")
    for family, full in duals.items():
        put_back(trained(full), full, root / family)
    return {family: root / family for family in FAMILIES}


def trained(full: Path, seed: int = 3) -> PreTrainedModel:
    model = load_vision_model(full)
    add_noise(model, 0.1, seed)
    return model


def put_back(model: PreTrainedModel, full: Path, folder: Path) -> None:
    export_dual_encoder(model, load_image_processor(full), full, folder, "# Card\n", {"seed": 1})


def inputs(folder: Path) -> dict[str, Tensor]:
    """Texts and pictures as the model's own processor prepares them."""
    processor = AutoProcessor.from_pretrained(folder)
    texts = processor.tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    pictures = [picture(index) for index in range(2)]
    return {**texts, **processor.image_processor(pictures, return_tensors="pt")}


def one_line(failure: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(failure.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
class TestPutBack:
    @torch.no_grad()
    def test_texts_are_as_before_and_images_as_the_encoder_sees_them(
        self, family: str, duals: dict[str, Path], merged: dict[str, Path]
    ) -> None:
        old = AutoModel.from_pretrained(duals[family]).eval()
        new, report = AutoModel.from_pretrained(merged[family], output_loading_info=True)
        assert not any(report.values())
        assert type(new) is type(old)
        given = inputs(merged[family])
        before, after = old(**given), new.eval()(**given)
        assert torch.equal(after.text_embeds, before.text_embeds)
        assert not torch.allclose(after.image_embeds, before.image_embeds, atol=1e-3)
        old.vision_model.load_state_dict(trained(duals[family]).state_dict())
        assert torch.equal(after.logits_per_image, old(**given).logits_per_image)

    def test_every_other_weight_is_that_of_the_full_model(
        self, family: str, duals: dict[str, Path], merged: dict[str, Path]
    ) -> None:
        before = load_file(duals[family] / "model.safetensors")
        after = load_file(merged[family] / "model.safetensors")
        encoder = trained(duals[family]).state_dict()
        assert before.keys() == after.keys()
        for name, weight in after.items():
            inside = name.removeprefix("vision_model.")
            assert torch.equal(weight, before[name] if inside == name else encoder[inside]), name

    def test_keys_are_those_that_transformers_4_reads(
        self, family: str, merged: dict[str, Path]
    ) -> None:
        tail = "head.probe" if family != "clip" else "embeddings.class_embedding"
        assert {
            "logit_scale",
            f"vision_model.{tail}",
            "vision_model.encoder.layers.0.self_attn.q_proj.weight",
            "vision_model.post_layernorm.weight",
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.1.mlp.fc2.bias",
            "text_model.final_layer_norm.weight",
        } <= load_file(merged[family] / "model.safetensors").keys()

    def test_folder_is_complete(
        self, family: str, duals: dict[str, Path], merged: dict[str, Path]
    ) -> None:
        old, new = ({p.name: p for p in folder[family].iterdir()} for folder in (duals, merged))
        assert new.keys() == old.keys() | {"manifest.json", "README.md"}
        for name in old.keys() - {"config.json", "model.safetensors"}:
            assert new[name].read_bytes() == old[name].read_bytes(), "old versions read the old one"
        assert check_folder(merged[family], "dual_encoder")["seed"] == 1
        assert new["README.md"].read_text(encoding="utf-8") == "# Card\n"

    def test_vision_half_of_the_result_is_the_encoder(
        self, family: str, duals: dict[str, Path], merged: dict[str, Path]
    ) -> None:
        half, encoder = load_vision_model(merged[family]), trained(duals[family])
        assert torch.equal(noise_features(half), noise_features(encoder))


def test_half_precision_is_kept_exactly_in_float32(duals: dict[str, Path], tmp_path: Path) -> None:
    full = shutil.copytree(duals["clip"], tmp_path / "full")
    old = AutoModel.from_pretrained(full).to(torch.float16)
    old.save_pretrained(full)
    model = trained(full).to(torch.bfloat16)
    put_back(model, full, tmp_path / "merged")
    new = AutoModel.from_pretrained(tmp_path / "merged")
    assert new.dtype == torch.float32
    assert torch.equal(new.text_projection.weight, old.text_projection.weight.float())
    for name, weight in model.state_dict().items():
        assert torch.equal(new.vision_model.state_dict()[name], weight.float())
    assert model.dtype == torch.bfloat16


def test_a_folder_that_exists_stays(duals: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").touch()
    with pytest.raises(ValueError, match="exists already"):
        put_back(trained(duals["clip"]), duals["clip"], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo"]


class TestDoesNotBelong:
    def refused(self, model: PreTrainedModel, full: Path, folder: Path) -> str:
        with pytest.raises(ValueError, match="training started from") as failure:
            put_back(model, full, folder / "merged")
        assert list(folder.glob("*merged*")) == []
        return one_line(failure)

    def test_another_class(self, duals: dict[str, Path], tmp_path: Path) -> None:
        message = self.refused(trained(duals["siglip"]), duals["clip"], tmp_path)
        for word in ("CLIPVisionModel", "SiglipVisionModel", str(duals["clip"])):
            assert word in message

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"intermediate_size": 48}, ("mlp.fc1", "(64,", "(48,")),
            ({"image_size": 48}, ("position_embedding.weight", "(17, 32)", "(37, 32)")),
            ({"num_hidden_layers": 5}, ("layers.4", "16 found keys are unexpected")),
            ({"num_hidden_layers": 3}, ("layers.3", "16 expected keys are missing")),
            ({"num_attention_heads": 8}, ("num_attention_heads (4, 8)", "other features")),
            ({"hidden_act": "gelu"}, ("hidden_act (quick_gelu, gelu)", "other features")),
        ],
    )
    def test_another_architecture(
        self,
        duals: dict[str, Path],
        tmp_path: Path,
        fields: dict[str, Any],
        words: tuple[str, ...],
    ) -> None:
        write_dual_encoder("clip", tmp_path / "other", **fields)
        message = self.refused(load_vision_model(tmp_path / "other"), duals["clip"], tmp_path)
        for word in words:
            assert word in message

    def test_what_a_hook_adds_is_not_in_the_weights(
        self, duals: dict[str, Path], tmp_path: Path
    ) -> None:
        model = trained(duals["clip"])

        def shift(module: object, args: object, output: dict[str, Tensor]) -> object:
            output["last_hidden_state"] = output["last_hidden_state"] + 0.5
            return output

        model.register_forward_hook(shift)
        assert "other features" in self.refused(model, duals["clip"], tmp_path)

    @pytest.mark.parametrize(
        "changed", [{"image_mean": [0.5] * 3}, {"size": {"shortest_edge": 40}}]
    )
    def test_images_prepared_otherwise(
        self, changed: dict[str, Any], duals: dict[str, Path], tmp_path: Path
    ) -> None:
        other = shutil.copytree(duals["clip"], tmp_path / "other")
        file = other / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
        with pytest.raises(ValueError, match="prepares images otherwise") as failure:
            export_dual_encoder(
                trained(other),
                load_image_processor(other),
                duals["clip"],
                tmp_path / "merged",
                "",
                {},
            )
        assert "preprocessor_config.json" in one_line(failure)


class TestLoad:
    def test_is_in_evaluation_mode_and_float32(self, duals: dict[str, Path]) -> None:
        model = load_dual_encoder(duals["siglip"])
        assert (model.training, model.dtype) == (False, torch.float32)

    @pytest.mark.parametrize("family", ["clip", "vit", "llama"])
    def test_a_single_backbone_is_none(
        self, family: str, backbone_folders: dict[str, Path]
    ) -> None:
        with pytest.raises(ValueError, match="no vision_config and text_config") as failure:
            load_dual_encoder(backbone_folders[family])
        assert str(backbone_folders[family]) in one_line(failure)

    def test_a_model_that_writes_text_is_none(self, tmp_path: Path) -> None:
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {"model_type": "llama", "vocab_size": 40, "intermediate_size": 16, **size}
        vision = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **size}
        config = {"model_type": "llava", "text_config": text, "vision_config": vision}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="not trained to compare images with texts") as failure:
            load_dual_encoder(tmp_path)
        one_line(failure)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere") as failure:
            load_dual_encoder(tmp_path / "nowhere")
        one_line(failure)

    def test_missing_weights_would_stay_random(
        self, duals: dict[str, Path], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(duals["clip"], tmp_path / "full")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="lacks 16 weights") as failure:
            load_dual_encoder(folder)
        assert "text_model.encoder.layers.2" in one_line(failure)

    @pytest.mark.parametrize(
        "missing", [["spiece.model", "tokenizer_config.json"], ["preprocessor_config.json"]]
    )
    def test_half_a_processor(
        self, missing: list[str], duals: dict[str, Path], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(duals["siglip"], tmp_path / "full")
        for name in missing:
            (folder / name).unlink()
        with pytest.raises(ValueError, match="no whole processor") as failure:
            load_processor(folder)
        assert str(folder) in one_line(failure)


class TestInterpolate:
    @pytest.fixture(scope="class", params=["clip", "dinov2", "timm", "naflex"])
    def pair(
        self, request: pytest.FixtureRequest, backbone_folders: dict[str, Path]
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        base, after = (load_vision_model(backbone_folders[request.param]) for _ in range(2))
        add_noise(after, 0.1)
        next(after.parameters()).data.view(-1)[0] = -0.0  # not what 0 * base + trained gives
        return base, after

    def test_equals_the_formula_and_leaves_both_alone(
        self, pair: tuple[PreTrainedModel, PreTrainedModel]
    ) -> None:
        base, after = pair
        before = [{n: w.clone() for n, w in model.state_dict().items()} for model in pair]
        mixed = interpolate_encoders(base, after, 0.3)
        assert type(mixed) is type(base)
        assert not mixed.training
        moved = 0
        for name, weight in mixed.state_dict().items():
            first, second = (state[name].double() for state in before)
            torch.testing.assert_close(weight.double(), 0.7 * first + 0.3 * second)
            moved += not torch.equal(first, second)
        assert moved > 8
        for model, state in zip(pair, before, strict=True):
            assert all(torch.equal(w, state[n]) for n, w in model.state_dict().items())

    @pytest.mark.parametrize("alpha", [0, 1])
    def test_ends_are_exact(
        self, pair: tuple[PreTrainedModel, PreTrainedModel], alpha: float
    ) -> None:
        end = pair[int(alpha)]
        mixed = interpolate_encoders(*pair, alpha)
        for name, weight in mixed.state_dict().items():
            expected = end.state_dict()[name]
            assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(noise_features(mixed), noise_features(end))


@pytest.mark.parametrize("alpha", [-0.01, 1.5, float("nan"), float("inf")])
def test_alpha_outside(alpha: float, duals: dict[str, Path]) -> None:
    model = load_vision_model(duals["clip"])
    with pytest.raises(ValueError, match=r"alpha is .* from 0 \(base\) to 1 \(trained\)"):
        interpolate_encoders(model, model, alpha)


def test_half_precision_is_computed_in_float32(duals: dict[str, Path]) -> None:
    base, after = (load(duals["clip"]).bfloat16() for load in (load_vision_model, trained))
    mixed = interpolate_encoders(base, after, 0.3)
    for name, weight in mixed.state_dict().items():
        first, second = (model.state_dict()[name].float() for model in (base, after))
        assert torch.equal(weight, ((1 - 0.3) * first + 0.3 * second).bfloat16()), name


def test_other_types_of_numbers_are_refused(duals: dict[str, Path]) -> None:
    base = load_vision_model(duals["clip"])
    with pytest.raises(ValueError, match=r"dtype torch.float32 .* torch.float16; load both alike"):
        interpolate_encoders(base, trained(duals["clip"]).half(), 0.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patch_size": 2 * PATCH_SIZE}, "patch_embedding.weight"),
        ({"num_hidden_layers": 3}, "layers.3"),
        ({"num_attention_heads": 8}, r"num_attention_heads \(4, 8\)"),
    ],
)
def test_nothing_lies_between_two_architectures(
    fields: dict[str, Any], words: str, duals: dict[str, Path], tmp_path: Path
) -> None:
    write_dual_encoder("clip", tmp_path / "other", **fields)
    base, other = load_vision_model(duals["clip"]), load_vision_model(tmp_path / "other")
    with pytest.raises(ValueError, match=words) as failure:
        interpolate_encoders(base, other, 0.5)
    one_line(failure)
    with pytest.raises(ValueError, match=r"CLIPVisionModel but .* SiglipVisionModel"):
        interpolate_encoders(base, load_vision_model(duals["siglip"]), 0.5)


def test_attention_implementations_do_not_matter(duals: dict[str, Path]) -> None:
    base = AutoModel.from_pretrained(duals["clip"], attn_implementation="eager").vision_model
    after = trained(duals["clip"])
    mixed = interpolate_encoders(base, after, 0.5)
    assert mixed.config._attn_implementation == after.config._attn_implementation != "eager"


@torch.no_grad()
def test_a_sweep_in_memory(duals: dict[str, Path]) -> None:
    full, after = load_dual_encoder(duals["siglip"]), trained(duals["siglip"])
    given = inputs(duals["siglip"])
    start = full(**given)
    base = load_vision_model(duals["siglip"])
    similar = []
    for alpha in (0, 0.5, 1):
        replace_vision_half(full, interpolate_encoders(base, after, alpha), "full")
        output = full(**given)
        assert torch.equal(output.text_embeds, start.text_embeds)
        similar.append((output.image_embeds * start.image_embeds).sum(dim=1).mean().item())
    assert similar[0] == pytest.approx(1)
    assert similar[0] > similar[1] > similar[2]


def test_card_warns() -> None:
    card = dual_encoder_card("openai/clip", "runs/x", "With alpha = 0.5.")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for needed in ("openai/clip", "runs/x", "alpha = 0.5", "AutoProcessor", "more\nthan 20 points"):
        assert needed in card
    assert "**Measure zero-shot accuracy before you use it.**" in card
