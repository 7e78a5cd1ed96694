"""What recording the gradient at every encoder layer costs a training step.

    python benchmarks/gradient_recording.py [--rounds 20]

The miniature's sizes (12 x 96 encoder, 8 x 128 language model, batch 64), a whole stage-3 step with
AdamW. Blocks of five recorded and five plain steps in turns; `gradients_every: N` costs an Nth.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, SiglipVisionConfig

from hive_vision.analysis.gradient_flow import GradientRecorder
from hive_vision.models.hive import HiveForConditionalGeneration

VISION = SiglipVisionConfig(
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=12,
    num_attention_heads=4,
    image_size=48,
    patch_size=8,
)
LANGUAGE = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
)
BATCH, TOKENS, BLOCK = 64, 24, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    model = HiveForConditionalGeneration.from_backbones(
        VISION, LANGUAGE, layer_selection="uniform", layer_density=0.25
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    recorder = GradientRecorder(model.vision_model)
    tokens = torch.randint(0, 512, (BATCH, TOKENS))
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 48, 48),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens,
    }

    def block(is_recorded: bool) -> float:
        started = time.perf_counter()
        for _ in range(BLOCK):
            if is_recorded:
                recorder.start()
            optimizer.zero_grad()
            model(**batch, return_logits=False).loss.backward()
            optimizer.step()
            if is_recorded:
                assert len(recorder.stop()) == VISION.num_hidden_layers
        return time.perf_counter() - started

    for warm in (False, True):
        block(warm)
    ratios = []
    for _ in range(rounds):
        plain, recorded = block(False), block(True)
        ratios.append(recorded / plain)
    first, median, third = statistics.quantiles(ratios, n=4)
    print(
        f"{torch.get_num_threads()} threads, {rounds} rounds of {BLOCK} steps in turns\n"
        f"a recorded step takes {median:.4f} of a plain one (quartiles {first:.4f} to {third:.4f});"
        f"\nevery 10th step recorded: {100 * (median - 1) / 10:+.2f}%, "
        f"every 20th: {100 * (median - 1) / 20:+.2f}%"
    )


if __name__ == "__main__":
    main()
