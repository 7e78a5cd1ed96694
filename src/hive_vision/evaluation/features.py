"""What a frozen encoder says about images.

Shapes: M images, N patch tokens, D encoder width.
"""

from pathlib import Path

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoImageProcessor

from hive_vision.models.backbones import (
    capture_block_outputs,
    find_blocks,
    image_token_counts,
    load_vision_model,
)


@torch.no_grad()
def mean_patch_features(
    encoder: str | Path, data: datasets.Dataset, batch_size: int = 128
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Average the patch tokens that leave the last block (before any final norm or pooling head).

    Those are what pre-training shaped; prefix tokens (CLS, registers) and padding are left out.

    Args:
        encoder: Folder or hub id.
        data: Columns ``image`` and ``label``.
        batch_size: Images at once.

    Returns:
        Features (M, D) and labels (M,).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_vision_model(encoder).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(encoder)
    depth = model.config.num_hidden_layers
    blocks = find_blocks(model, depth)
    _, prefix_tokens = image_token_counts(model.config)
    features = []
    for batch in data.iter(batch_size):
        images = processor(batch["image"], return_tensors="pt").to(device)
        with capture_block_outputs(blocks, [depth]) as outputs:
            model(**images)
        patches = outputs[depth][:, prefix_tokens:].float()
        mask = images.get("pixel_attention_mask", torch.ones(patches.shape[:2], device=device))
        summed = torch.einsum("mnd,mn->md", patches, mask.float())
        features.append((summed / mask.sum(dim=1, keepdim=True)).cpu().numpy())
    return np.concatenate(features), np.asarray(data["label"], dtype=np.int64)
