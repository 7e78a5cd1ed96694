"""LLaVA checkpoints: what is written is what was trained, for anyone who loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from hive_vision.folders import check_folder
from hive_vision.models import vlm
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.models.vlm import VlmInputs, export_vlm, vlm_card
from tests.models.published_templates import QWEN_2_5, SPECIAL

PAIRS = [("siglip", "llama"), ("clip", "qwen2"), ("dinov2", "llama"), ("dinov3", "qwen3")]


def joined(vision: Path, language: Path, template: str | None = "llava") -> tuple[Any, VlmInputs]:
    inputs = VlmInputs.from_backbones(vision, language, template)
    model = SelfAttentionForConditionalGeneration.from_backbones(
        vision, language, image_token_id=inputs.form.image_token_id
    )
    return model, inputs


@pytest.fixture(scope="module")
def chat_model(backbone_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that was taught Qwen's template, its embedding with a few spare rows."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(backbone_folders["qwen2"])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = QWEN_2_5
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone_folders["qwen2"])
    model.resize_token_embeddings(len(tokenizer) + 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestExport:
    @pytest.mark.parametrize(("vision", "language"), PAIRS)
    def test_loads_with_transformers_alone(
        self, vision: str, language: str, backbone_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        model, inputs = joined(backbone_folders[vision], backbone_folders[language])
        export_vlm(model, inputs, tmp_path / "model", "# card", {"version": "x"})
        check_folder(tmp_path / "model", "vlm")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        assert type(loaded) is LlavaForConditionalGeneration
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
        assert loaded.config.image_seq_length == inputs.image_tokens
        processor = AutoProcessor.from_pretrained(tmp_path / "model")
        assert processor.tokenizer.eos_token == "</s>"
        batch = processor(images=Image.new("RGB", (40, 30)), text="<image>", return_tensors="pt")
        assert (batch["input_ids"] == inputs.form.image_token_id).sum() == inputs.image_tokens

    def test_a_template_of_its_own(
        self, chat_model: Path, backbone_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        model, inputs = joined(backbone_folders["siglip"], chat_model, None)
        export_vlm(model, inputs, tmp_path / "model", "# card", {})
        processor = AutoProcessor.from_pretrained(tmp_path / "model")
        asked = [{"type": "image"}, {"type": "text", "text": "what?"}]
        prompt = [{"role": "user", "content": asked}]
        text = processor.apply_chat_template(prompt, add_generation_prompt=True)
        assert text.endswith("<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n")
        ends = transformers.GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
        assert processor.tokenizer.eos_token == "<|im_end|>"
        assert ends == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def test_names_that_version_4_reads(
        self, backbone_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        """Version 4 itself reads exports in tests/harness."""
        for vision in ("siglip", "dinov2"):
            model, inputs = joined(backbone_folders[vision], backbone_folders["llama"])
            export_vlm(model, inputs, tmp_path / vision, "# card", {})
        inside = load_file(tmp_path / "siglip" / "model.safetensors")
        flat = load_file(tmp_path / "dinov2" / "model.safetensors")
        towers = [
            {key for key in weights if key.startswith("vision_tower.")}
            for weights in (inside, flat)
        ]
        assert all(key.startswith("vision_tower.vision_model.") for key in towers[0])
        assert towers[0]
        assert not any("vision_model" in key for key in towers[1])
        tokenizer = json.loads((tmp_path / "siglip" / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert tokenizer["extra_special_tokens"] == {"image_token": "<image>"}
        assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
        assert tokenizer["add_prefix_space"] is True, "version 4 would turn it off"

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "default", "rope_theta": 500000.0},
            {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ],
    )
    def test_rope_in_the_words_of_both_versions(
        self, rope: dict[str, Any], backbone_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        model, inputs = joined(backbone_folders["siglip"], backbone_folders["llama"])
        model.config.text_config.rope_parameters = rope
        export_vlm(LlavaForConditionalGeneration(model.config), inputs, tmp_path / "m", "", {})
        text = json.loads((tmp_path / "m" / "config.json").read_text())["text_config"]
        assert text["rope_theta"] == 500000.0
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        assert text["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)
        assert AutoConfig.from_pretrained(tmp_path / "m").text_config.rope_parameters == rope

    def test_replaces_as_a_whole(self, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old").touch()
        model, inputs = joined(backbone_folders["siglip"], backbone_folders["llama"])
        export_vlm(model, inputs, tmp_path / "model", "# card", {})
        assert not (tmp_path / "model" / "old").exists()


def _weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["multi_modal_projector.linear_1.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change(name: str, key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content[key] = value
        (folder / name).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_weights, "gives other logits"),
        (_missing, "1 wrong keys"),
        (_change("config.json", "vision_feature_layer", -3), "gives other logits"),
        (_change("processor_config.json", "num_additional_image_tokens", 1), "gives other tokens"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ 'Q: <image>' }}"),
            "gives other tokens",
        ),
    ],
    ids=["weights", "missing", "layer", "image tokens", "template"],
)
def test_a_mismatch_is_an_error(
    spoil: Any,
    message: str,
    backbone_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And leaves nothing behind."""
    real = vlm._speak_to_version_4

    def spoiled(folder: Path, prefixed: bool) -> None:
        real(folder, prefixed)
        spoil(folder)

    monkeypatch.setattr(vlm, "_speak_to_version_4", spoiled)
    model, inputs = joined(backbone_folders["siglip"], backbone_folders["llama"])
    with pytest.raises(RuntimeError, match=message):
        export_vlm(model, inputs, tmp_path / "model", "# card", {})
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_both(tmp_path: Path) -> None:
    card = vlm_card("runs/hive/encoder", "llama", "| stage |")
    assert "`runs/hive/encoder`" in card
    assert "`llama`" in card
    assert "| stage |" in card
