"""Time and memory of all maps of one image at the paper's real sizes, random weights.

    python benchmarks/maps_at_full_size.py

SigLIP-L/16 at 384 pixels (24 layers, 576 patches) and a Llama of MobileLLM-350M's shape: gradient
maps of 24 layers, attention maps, the figures as PNG and SVG. Loading is not counted.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from hive_vision.analysis.findings import CaptionedImage, MapFindings, Shown
from hive_vision.analysis.inspection import InspectedModel
from hive_vision.analysis.maps import attention_maps, gradient_maps
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.reporting.map_report import MapStyle, write_maps
from hive_vision.studies.recipe_model import backbone_config

CAPTION = "a horse rider in full riding gear is riding on a horse"  # Figure 2
VISION = backbone_config("google/siglip-large-patch16-384", "vision")
LANGUAGE = backbone_config("facebook/MobileLLM-350M", "language")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("hive", "cascaded", "sa"), default="hive")
    method = parser.parse_args().method
    torch.manual_seed(0)
    model = build(method)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    started = time.perf_counter()
    sample = model.prepare(image, CAPTION)
    gradients, attention = gradient_maps(model, sample), attention_maps(model, sample)
    computed = time.perf_counter() - started
    shown = Shown(
        CaptionedImage("noise", image, CAPTION),
        sample.image,
        {method: sample.tokens},
        {method: gradients},
        {method: attention},
    )
    with tempfile.TemporaryDirectory() as folder:
        found = MapFindings({method: ""}, [shown], {}, {}, {}, {}, 0, "noise")
        write_maps(found, Path(folder), MapStyle())
    total = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{method}: {len(gradients.norms)} layers, {attention.weights.shape[0]} attending, "
        f"{computed:.1f} s computing, {total:.1f} s with figures, peak RSS {peak:.1f} GiB "
        f"(model included), {torch.get_num_threads()} threads"
    )


def build(method: str) -> InspectedModel:
    tokenizer = build_tokenizer()
    if method == "sa":
        image_token = tokenizer.convert_tokens_to_ids("<image>")
        model = SelfAttentionForConditionalGeneration.from_backbones(
            VISION, LANGUAGE, image_token_id=image_token
        )
    else:
        shared = {"layer_selection": "uniform", "layer_density": 0.25}
        model = HiveForConditionalGeneration.from_backbones(
            VISION, LANGUAGE, **(shared if method == "hive" else cascaded_options())
        )
    processor = SiglipImageProcessor(size={"height": 384, "width": 384})
    return InspectedModel(model.eval(), HiveProcessor(processor, tokenizer))


def cascaded_options() -> dict[str, object]:
    from hive_vision.training.arguments import ModelArguments

    return ModelArguments("", "", layer_density=0.25).fusion_options("cascaded")


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([CAPTION] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


if __name__ == "__main__":
    main()
