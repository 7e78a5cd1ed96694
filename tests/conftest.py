"""Tiny random models and data in the real file formats, made once for a session."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hive-vision-tests-")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tiny tensors: a second thread only costs, and much when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
torch.set_num_threads(1)

VOCABULARY = 300
IMAGE_SIZE, PATCH_SIZE = 32, 8
WORDS = ["a", "small", "large", "red", "blue", "green", "circle", "square", "star", "left", "and"]


def vision_config(family: str, layers: int = 8) -> transformers.PreTrainedConfig:
    """An encoder configuration: width 32, 4x4 patches."""
    options = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    match family:
        case "clip":
            return transformers.CLIPVisionConfig(intermediate_size=64, **options)
        case "siglip":
            return transformers.SiglipVisionConfig(intermediate_size=64, **options)
        case "dinov2":
            return transformers.Dinov2Config(mlp_ratio=2, **options)
        case "vit":
            return transformers.ViTConfig(intermediate_size=64, **options)
        case "dinov3":  # its positions are jittered while it trains, unless told not to
            return transformers.DINOv3ViTConfig(
                intermediate_size=64, num_register_tokens=4, pos_embed_rescale=None, **options
            )
        case "aimv2":
            return transformers.Aimv2VisionConfig(intermediate_size=64, **options)
        case "timm":  # as timm's own folders on the hub say it
            size = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": 32}
            return transformers.TimmWrapperConfig(
                architecture="vit_tiny_patch16_224",
                model_args={**size, "depth": layers, "num_heads": 4},
                pretrained_cfg={
                    "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
                    "interpolation": "bicubic",
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                    "crop_pct": 1.0,
                },
            )
        case "naflex":
            del options["image_size"]
            return transformers.Siglip2VisionConfig(
                intermediate_size=64, num_patches=(IMAGE_SIZE // PATCH_SIZE) ** 2, **options
            )
    raise AssertionError(family)


def text_config(family: str, layers: int = 4) -> transformers.PreTrainedConfig:
    """A language-model configuration: width 48, 4 heads of 12."""
    options = {
        "hidden_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 12}
    grouped_queries = {"num_key_value_heads": 2, "intermediate_size": 96}
    match family:
        case "llama":
            return transformers.LlamaConfig(tie_word_embeddings=True, **grouped, **options)
        case "qwen3":
            return transformers.Qwen3Config(**grouped, **options)
        case "gemma3":
            return transformers.Gemma3TextConfig(final_logit_softcapping=5.0, **grouped, **options)
        case "neox":
            return transformers.GPTNeoXConfig(intermediate_size=96, **options)
        case "opt":
            return transformers.OPTConfig(
                ffn_dim=96,
                dropout=0.0,
                word_embed_proj_dim=48,
                max_position_embeddings=128,
                **options,
            )
        case "qwen2":
            return transformers.Qwen2Config(**grouped_queries, **options)
        case "smollm3":
            return transformers.SmolLM3Config(**grouped_queries, **options)
        case "olmo2":
            return transformers.Olmo2Config(**grouped_queries, **options)
        case "phi3":
            return transformers.Phi3Config(**grouped_queries, **options)
        case "gpt2":
            dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            return transformers.GPT2Config(n_positions=128, **dropout, **options)
    raise AssertionError(family)


# Encoders of images of one size; "naflex" reads any shape and stands beside them.
VISION_FAMILIES = ("clip", "siglip", "dinov2", "vit", "dinov3", "aimv2", "timm")
LANGUAGE_FAMILIES = (
    *("llama", "qwen3", "gemma3", "neox", "opt"),
    *("qwen2", "smollm3", "olmo2", "phi3", "gpt2"),
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with exactly ``VOCABULARY`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4 + WORDS, trainer)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY - tokenizer.get_vocab_size())])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def backbone_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family as a checkpoint folder with image processor or tokenizer beside it."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    folders = {}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    for family in (*VISION_FAMILIES, "naflex"):
        folders[family] = root / family
        transformers.AutoModel.from_config(vision_config(family)).save_pretrained(root / family)
        if family == "naflex":
            transformers.Siglip2ImageProcessor(
                patch_size=PATCH_SIZE, max_num_patches=20
            ).save_pretrained(root / family)
        elif family != "timm":  # whose image processor is read from config.json
            transformers.SiglipImageProcessor(size=size).save_pretrained(root / family)
    for family in LANGUAGE_FAMILIES:
        folders[family] = root / family
        model = transformers.AutoModelForCausalLM.from_config(text_config(family))
        model.save_pretrained(root / family)
        make_tokenizer().save_pretrained(root / family)
    return folders


def write_image_folder(folder: Path, count: int, seed: int = 0) -> Path:
    """Random images with random captions in the image-folder convention."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        pixels = random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
        caption = " ".join(random.choice(WORDS, size=int(random.integers(3, 12))))
        rows.append({"file_name": f"{index:03}.png", "caption": caption})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 captioned images."""
    return write_image_folder(tmp_path_factory.mktemp("images") / "captioned", 40)
