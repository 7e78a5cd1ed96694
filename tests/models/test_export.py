"""The exported encoder is a stock folder with the same features."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from hive_vision.models.backbones import (
    capture_block_outputs,
    find_blocks,
    load_vision_model,
)
from hive_vision.models.export import encoder_card, export_encoder
from tests.conftest import VISION_FAMILIES
from tests.models.conftest import MakeHive
from tests.models.helpers import add_noise, images


@pytest.fixture(params=VISION_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def trained(family: str, folders: dict[str, Path]) -> PreTrainedModel:
    """An encoder that is no longer the one in the folder."""
    model = load_vision_model(folders[family])
    add_noise(model, 0.1)
    return model


def export(model: PreTrainedModel, source: Path, folder: Path, card: str = "# Card\n") -> None:
    export_encoder(
        model, AutoImageProcessor.from_pretrained(source), folder, card, {"method": "hive"}
    )


@torch.no_grad()
def test_automodel_alone_gives_identical_features(
    family: str, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(family, backbone_folders)
    export(model, backbone_folders[family], tmp_path / "encoder")
    loaded, report = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    ours = model.eval()(images(2), output_hidden_states=True)
    theirs = loaded.eval()(images(2), output_hidden_states=True)
    assert torch.equal(theirs.last_hidden_state, ours.last_hidden_state)
    assert torch.equal(theirs.pooler_output, ours.pooler_output)
    assert all(map(torch.equal, theirs.hidden_states, ours.hidden_states))


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        (
            "clip",
            {
                "vision_model.embeddings.class_embedding",
                "vision_model.pre_layrnorm.weight",
                "vision_model.encoder.layers.0.self_attn.q_proj.weight",
                "vision_model.encoder.layers.7.mlp.fc2.bias",
                "vision_model.post_layernorm.weight",
            },
        ),
        (
            "siglip",
            {
                "vision_model.embeddings.patch_embedding.weight",
                "vision_model.encoder.layers.0.self_attn.out_proj.weight",
                "vision_model.post_layernorm.weight",
                "vision_model.head.probe",
                "vision_model.head.attention.in_proj_weight",
            },
        ),
        (
            "dinov2",
            {
                "embeddings.cls_token",
                "embeddings.patch_embeddings.projection.weight",
                "encoder.layer.0.attention.attention.query.weight",
                "encoder.layer.0.attention.output.dense.weight",
                "encoder.layer.0.layer_scale1.lambda1",
                "encoder.layer.7.mlp.fc1.weight",
                "layernorm.weight",
            },
        ),
        (
            "vit",
            {
                "embeddings.cls_token",
                "embeddings.patch_embeddings.projection.weight",
                "encoder.layer.0.attention.attention.query.weight",
                "encoder.layer.0.attention.output.dense.weight",
                "encoder.layer.7.intermediate.dense.weight",
                "encoder.layer.0.layernorm_before.weight",
                "pooler.dense.weight",
            },
        ),
    ],
)
def test_keys_are_those_that_transformers_4_reads(
    family: str, keys: set[str], backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(family, backbone_folders)
    export(model, backbone_folders[family], tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    assert keys <= weights.keys()
    assert len(weights) == len(model.state_dict())
    prefixed = [name.startswith("vision_model.") for name in weights]
    assert all(prefixed) if family in ("clip", "siglip") else not any(prefixed)
    assert not any("vision_model.vision_model" in name for name in weights)


def test_folder_is_complete(family: str, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    export(trained(family, backbone_folders), backbone_folders[family], folder, "# A card\n")
    files = {"config.json", "model.safetensors", "manifest.json", "README.md"}
    if family != "timm":  # timm's image processor is read from config.json
        files.add("preprocessor_config.json")
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A card\n"
    ours = AutoImageProcessor.from_pretrained(folder)
    theirs = AutoImageProcessor.from_pretrained(backbone_folders[family])
    assert type(ours) is type(theirs)
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    assert torch.equal(
        ours(picture, return_tensors="pt")["pixel_values"],
        theirs(picture, return_tensors="pt")["pixel_values"],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"], "nothing is left beside it"


def test_an_existing_folder_is_replaced_as_a_whole(
    backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, source = tmp_path / "encoder", backbone_folders["clip"]
    export(trained("vit", backbone_folders), backbone_folders["vit"], folder, "old")
    (folder / "leftover.bin").write_bytes(b"old")
    export(trained("clip", backbone_folders), source, folder, "new")
    assert not (folder / "leftover.bin").exists()
    assert (folder / "README.md").read_text(encoding="utf-8") == "new"
    assert AutoModel.from_pretrained(folder).config.model_type == "clip_vision_model"


def test_the_encoder_of_a_hive_model(
    family: str, open_hive: MakeHive, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = open_hive(family, "llama")
    export(model.vision_model, backbone_folders[family], tmp_path / "encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        with capture_block_outputs(find_blocks(loaded), [4, 8]) as expected:
            loaded(images(2))
        features = model.get_encoder_features(images(2))
    assert all(torch.equal(features[layer], expected[layer]) for layer in (4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_the_encoder_itself_is_not_changed(
    dtype: torch.dtype, training: bool, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = trained("siglip", backbone_folders).to(dtype).train(training)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    export(model, backbone_folders["siglip"], tmp_path / "encoder")
    assert model.training is training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state), "exporting must not shift training"
    assert AutoModel.from_pretrained(tmp_path / "encoder").dtype == dtype


def test_features_that_the_weights_do_not_give_are_refused(
    family: str, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    """What a hook adds is in the encoder's features but not in its weights."""
    folder, model = tmp_path / "encoder", trained(family, backbone_folders)
    export(model, backbone_folders[family], folder, "good")

    def shift(module: object, args: object, output: dict[str, torch.Tensor]) -> object:
        output["last_hidden_state"] = output["last_hidden_state"] + 0.5
        return output

    model.register_forward_hook(shift)
    with pytest.raises(RuntimeError, match=r"gives other features .* largest difference 0\.5"):
        export(model, backbone_folders[family], folder, "bad")
    assert (folder / "README.md").read_text(encoding="utf-8") == "good", "the old one stays"


def test_weights_that_a_stock_encoder_does_not_know_are_refused(
    family: str, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(family, backbone_folders)
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"exported encoder has 1 wrong keys, first '.*extra'"):
        export(model, backbone_folders[family], tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_implementation_can_be_exported(
    attention: str, family: str, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(backbone_folders[family], attn_implementation=attention)
    export(model, backbone_folders[family], tmp_path / "encoder")


def test_card_says_where_it_comes_from_and_how_to_use_it() -> None:
    card = encoder_card("openai/clip", "hive", "loss 1.25")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for needed in ("openai/clip", "`hive`", "loss 1.25", "AutoModel.from_pretrained"):
        assert needed in card
