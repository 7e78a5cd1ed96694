"""Exports in transformers 4.57, the previous major version, against this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.models.vlm import VlmInputs, export_vlm

# Where `make test-eval` installs it, beside the version that everything else uses.
PREVIOUS = Path(sys.prefix) / "transformers-4"
PAIRS = [("siglip", "llama"), ("clip", "qwen2"), ("dinov2", "llama")]

LOOK = """
import json, sys
import numpy as np, torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
asked = [{"type": "image"}, {"type": "text", "text": "what is red?"}]
text = processor.apply_chat_template(
    [{"role": "user", "content": asked}], add_generation_prompt=True
)
inputs = processor(images=Image.open(image), text=text, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
np.save(out, logits.numpy())
print(json.dumps({
    "version": transformers.__version__,
    "ids": inputs["input_ids"].tolist(),
    "answer": answer.tolist(),
}))
"""


def look(folder: Path, image: Path, out: Path, path: Path | None) -> tuple[dict[str, Any], Any]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    found = subprocess.run(
        [sys.executable, "-c", LOOK, str(folder), str(image), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1]), np.load(out)


@pytest.mark.skipif(not PREVIOUS.is_dir(), reason=f"no transformers 4.57 in {PREVIOUS}")
@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_same_tokens_logits_and_answer(
    vision: str, language: str, backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    inputs = VlmInputs.from_backbones(backbone_folders[vision], backbone_folders[language], "llava")
    model = SelfAttentionForConditionalGeneration.from_backbones(
        backbone_folders[vision],
        backbone_folders[language],
        image_token_id=inputs.form.image_token_id,
    )
    export_vlm(model, inputs, tmp_path / "model", "# card", {})
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    arguments = (tmp_path / "model", tmp_path / "image.png", tmp_path / "logits.npy")
    now, logits = look(*arguments, None)
    then, before = look(*arguments, PREVIOUS)
    assert (now.pop("version")[0], then.pop("version")[0]) == ("5", "4")
    assert now == then
    np.testing.assert_allclose(logits, before, atol=1e-5)
