"""LLaVA-style models as stock transformers checkpoints: what goes in, what comes out, the proof.

Everything that has to agree is derived from one place: image tokens, feature layer and strategy
from the encoder; end of turn, chat template and special tokens from the conversation format.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from hive_vision.conversation import IMAGE_TOKEN, Turn
from hive_vision.folders import seal, written_aside
from hive_vision.models.backbones import image_token_counts, load_config
from hive_vision.models.chat_templates import ConversationFormat
from hive_vision.models.export import OLD_PREFIX, WEIGHTS, had_prefix
from hive_vision.models.processing import HiveProcessor, check_image_size

MOST_NEW_TOKENS = 8  # that an export writes to show that it can


@dataclass(frozen=True)
class VlmInputs:
    """What prepares images and conversations for a LLaVA-style model.

    Attributes:
        processor: transformers' processor, as it is exported.
        form: Makes token ids of conversations.
        image_tokens: Tokens that each image becomes.
    """

    processor: LlavaProcessor
    form: ConversationFormat
    image_tokens: int

    @classmethod
    def from_backbones(
        cls, vision: str | Path, language: str | Path, template: str | None = None
    ) -> "VlmInputs":
        """Join an encoder's image processor and a language model's tokenizer.

        Args:
            vision: Encoder: hub id or local folder.
            language: Causal language model, given likewise.
            template: Chat template, or ``llava``; the tokenizer's own if not given.

        Raises:
            ValueError: If either is missing, or they cannot be used together.
        """
        parts = HiveProcessor.from_backbones(vision, language)
        config = load_config(vision, "vision")
        check_image_size(parts.image_processor, config, str(vision))
        form = ConversationFormat(parts.tokenizer, template)
        parts.tokenizer.eos_token = form.end_token  # what ends generation, also for lmms-eval
        patches, prefix = image_token_counts(config)
        drops_cls = prefix == 1  # the one token that LLaVA can leave out
        processor = LlavaProcessor(
            parts.image_processor,
            parts.tokenizer,
            patch_size=config.patch_size,
            vision_feature_select_strategy="default" if drops_cls else "full",
            num_additional_image_tokens=prefix,
            chat_template=form.template,
            image_token=IMAGE_TOKEN,
        )
        return cls(processor, form, patches if drops_cls else patches + prefix)


def export_vlm(
    model: PreTrainedModel, inputs: VlmInputs, folder: Path, card: str, facts: Mapping[str, Any]
) -> None:
    """Write a stock LLaVA checkpoint, and prove that it loads and says the same.

    It loads with ``AutoModelForImageTextToText`` and ``AutoProcessor``, in transformers 4.57 too.

    Args:
        model: transformers' LLaVA, or our subclass of it.
        inputs: What it was trained with.
        folder: Where to write; replaced as a whole if it exists.
        card: Text of the model card (README.md).
        facts: For the manifest: where the weights come from.

    Raises:
        RuntimeError: If what is read back differs from the model.
    """
    stock = LlavaForConditionalGeneration(model.config)
    stock.load_state_dict(model.state_dict())
    tokenizer = inputs.processor.tokenizer
    stock.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with written_aside(folder, replace=True) as aside:
        stock.eval().save_pretrained(aside, max_shard_size="1TB")
        inputs.processor.save_pretrained(aside)
        _speak_to_version_4(aside, had_prefix(stock.model.vision_tower))
        (aside / "README.md").write_text(card, encoding="utf-8")
        _verify(stock, inputs, aside)
        seal(aside, "vlm", **facts)


def _speak_to_version_4(folder: Path, prefixed: bool) -> None:
    """Write names that both major versions of transformers read.

    Version 4 would load CLIP and SigLIP without ``vision_model.`` in their names at random, with a
    warning only, fail at the tokenizer, forget that it puts a space before a text unless its
    configuration says so, and take the usual rope frequencies for any other.
    """
    if prefixed:
        tower = "vision_tower."
        weights = {
            key.replace(tower, tower + OLD_PREFIX, 1) if key.startswith(tower) else key: weight
            for key, weight in load_file(folder / WEIGHTS).items()
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer.pop("backend", None)
    tokenizer |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "model_input_names": ["input_ids", "attention_mask"],  # version 4 adds one LLaVA refuses
    }
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (backend["pre_tokenizer"] or {}).get("add_prefix_space"):
        tokenizer["add_prefix_space"] = True
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config["text_config"].get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["text_config"]["rope_theta"] = rope.pop("rope_theta")
        scaled = rope.get("rope_type", "default") != "default"
        config["text_config"]["rope_scaling"] = rope if scaled else None
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


@torch.no_grad()
def _verify(model: PreTrainedModel, inputs: VlmInputs, folder: Path) -> None:
    """Read a checkpoint back as anyone would; compare tokens, logits and an answer."""
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        output_loading_info=True,
    )
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise RuntimeError(f"exported model has {len(wrong)} wrong keys, first {wrong[0]!r}")
    processor = AutoProcessor.from_pretrained(folder)
    size = model.config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    noise = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    asked = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True
    )
    batch = processor(images=image, text=text, return_tensors="pt")
    expected = _as_trained(inputs, "What is this?")
    if batch["input_ids"][0].tolist() != expected:
        raise RuntimeError("exported processor gives other tokens than the model was trained on")
    batch = batch.to(model.device)
    loaded.to(model.device).eval()
    logits = model(**batch).logits
    difference = (loaded(**batch).logits - logits).abs().max().item()
    if not difference <= 1e-4 * max(1.0, logits.abs().max().item()):
        raise RuntimeError(
            f"exported model gives other logits, largest difference {difference:.3g}"
        )
    first, second = (
        m.generate(**batch, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
        for m in (model, loaded)
    )
    if not torch.equal(first, second):
        raise RuntimeError("exported model writes another answer than the trained one")


def _as_trained(inputs: VlmInputs, question: str) -> list[int]:
    """Token ids of a question about an image, as training had them."""
    asked = Turn(role="user", content=f"{IMAGE_TOKEN}\n{question}")
    encoded = inputs.form.encode([asked, Turn(role="assistant", content="x")])
    image = inputs.form.image_token_id
    return [
        token
        for token in encoded.input_ids[: encoded.learned[0][0]]
        for _ in range(inputs.image_tokens if token == image else 1)
    ]


def vlm_card(vision: str, language: str, summary: str) -> str:
    """Write the model's card.

    Args:
        vision: Hub id or folder of the encoder.
        language: Hub id or folder of the language model.
        summary: Markdown about the run.
    """
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- hive-vision
---

# Vision-language model

LLaVA on the encoder `{vision}` and the language model `{language}`. A plain transformers model:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("model")
processor = AutoProcessor.from_pretrained("model")
asked = [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]
text = processor.apply_chat_template(
    [{{"role": "user", "content": asked}}], add_generation_prompt=True
)
inputs = processor(images=image, text=text, return_tensors="pt")
answer = processor.batch_decode(model.generate(**inputs, max_new_tokens=64))
```

{summary}
"""
