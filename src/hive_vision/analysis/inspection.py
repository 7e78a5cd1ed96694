"""A trained model to look into, one image with its caption at a time, without changing it.

Shapes: L encoder layers, N image tokens (prefix included), R x C patches, D encoder width, T text
tokens (start and end included).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from hive_vision.data.collators import CaptionCollator
from hive_vision.models.backbones import (
    backbones_of,
    capture_block_outputs,
    find_blocks,
    has_any_size,
    pair,
)
from hive_vision.models.configuration import HiveConfig
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.processing import HiveProcessor
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration

# Of a run, the last one first.
STAGES = ("stage3", "stage2", "stage1")


@dataclass(frozen=True)
class Sample:
    """An image and its caption as a model reads them.

    Attributes:
        inputs: A batch of one, with labels.
        image: As the encoder sees it: resized and cropped.
        grid: R and C.
        tokens: T texts.
        places: (T,) where they stand in ``input_ids``.
        spans: (T,) characters of the caption ``[start, stop)``; empty for start and end.
    """

    inputs: dict[str, Tensor]
    image: Image.Image
    grid: tuple[int, int]
    tokens: tuple[str, ...]
    places: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class InspectedModel:
    """A model of method ``hive``, ``cascaded`` or ``sa`` (or any LLaVA), and what feeds it.

    Args:
        model: The model; nothing of it is changed by looking.
        processor: Image processor and tokenizer.
    """

    def __init__(self, model: PreTrainedModel, processor: HiveProcessor) -> None:
        self.model = model
        self.processor = processor
        self.is_llava = model.config.model_type == "llava"
        self.vision, self.language = backbones_of(model)
        self.depth: int = model.config.vision_config.num_hidden_layers
        self.blocks = find_blocks(self.vision, self.depth)

    @classmethod
    def from_folder(cls, folder: str | Path, stage: str | None = None) -> Self:
        """Load a model.

        Args:
            folder: A run of ``hive-vision pretrain`` or ``finetune``, or a model's folder.
            stage: Which stage's model of a run; the last finished one if not given.

        Raises:
            ValueError: If there is no such model.
        """
        path = find_model(folder, stage)
        found = AutoProcessor.from_pretrained(path)
        if not isinstance(found, HiveProcessor):
            found = HiveProcessor(found.image_processor, found.tokenizer)
        is_llava = AutoConfig.from_pretrained(path).model_type == "llava"
        loader = SelfAttentionForConditionalGeneration if is_llava else HiveForConditionalGeneration
        model = loader.from_pretrained(path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.eval().to(device), found)

    def prepare(self, image: Image.Image, caption: str) -> Sample:
        """Make a batch of one.

        Args:
            image: RGB.
            caption: Its text; what is longer than the model's limit is cut.
        """
        (ids,) = self.processor.encode_captions([caption])
        config, tokenizer = self.model.config, self.processor.tokenizer
        count = config.image_seq_length if self.is_llava else 0
        placeholders = (config.image_token_index,) * count if self.is_llava else ()
        collator = CaptionCollator(
            self.processor.image_processor, tokenizer.pad_token_id, placeholders
        )
        sample: Any = {"image": image, "input_ids": ids, "sample_id": 0, "bad_samples": []}
        batch = collator([sample])
        inputs = {
            name: value.to(self.model.device)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return Sample(
            inputs=inputs,
            image=self._seen(image, inputs["pixel_values"]),
            grid=self._grid(inputs),
            tokens=tuple(tokenizer.decode([token]).strip() for token in ids),
            places=(0, *range(1 + count, count + len(ids))),
            spans=((0, 0), *self._spans(caption)[: len(ids) - 2], (0, 0)),
        )

    def tokens_left_out(self, caption: str) -> int:
        """How many of a caption's tokens lie beyond the model's limit, and are cut."""
        return max(0, len(self._spans(caption)) + 2 - self.processor.max_text_tokens)

    def _spans(self, caption: str) -> list[tuple[int, int]]:
        """Characters ``[start, stop)`` of each token of the whole caption."""
        offsets = self.processor.tokenizer(
            caption,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
            verbose=False,
        )["offset_mapping"]
        return [tuple(span) for span in offsets]

    def loss(self, sample: Sample, **changed: Tensor) -> Tensor:
        """Compute the mean loss per caption token."""
        loss: Tensor = self.model(**{**sample.inputs, **changed}, return_logits=False).loss
        return loss

    def layer_gradients(
        self, sample: Sample, parameters: bool = False
    ) -> tuple[float, list[Tensor | None], list[Tensor | None]]:
        """Differentiate the loss with respect to every encoder layer's output.

        Args:
            sample: What is read.
            parameters: Also with respect to each block's parameters.

        Returns:
            The loss; L gradients (N, D), ``None`` where the loss does not depend on a layer; if
            asked for, L gradients of all parameters of a block, as one vector each.
        """
        layers = range(1, self.depth + 1)
        weights = [list(block.parameters()) for block in self.blocks] if parameters else []
        flat = [weight for group in weights for weight in group]
        with undisturbed(self.model), torch.enable_grad():
            for weight in flat:
                weight.requires_grad_(True)
            pixels = sample.inputs["pixel_values"].detach().clone().requires_grad_(True)
            with capture_block_outputs(self.blocks, layers) as features:
                loss = self.loss(sample, pixel_values=pixels)
            wanted = [*(features[layer] for layer in layers), *flat]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        outputs: list[Tensor | None] = [
            None if g is None else g[0].detach() for g in found[: self.depth]
        ]
        rest, vectors = list(found[self.depth :]), []
        for group in weights:
            mine, rest = rest[: len(group)], rest[len(group) :]
            reached = [g.reshape(-1) for g in mine if g is not None]
            vectors.append(torch.cat(reached) if reached else None)
        return float(loss.detach()), outputs, vectors

    def patches(self, tokens: Tensor, grid: tuple[int, int]) -> NDArray[np.float64]:
        """Lay out what belongs to image tokens (..., N) on the patch grid (..., R, C)."""
        prefix = self.prefix(tokens.shape[-1], grid)
        values = tokens[..., prefix : prefix + grid[0] * grid[1]].double().cpu().numpy()
        return np.asarray(values.reshape(*tokens.shape[:-1], *grid))

    def prefix(self, count: int, grid: tuple[int, int]) -> int:
        """How many of the image tokens stand before the patches (CLS, registers)."""
        if has_any_size(self.model.config.vision_config):
            return 0  # what lies behind the patches there is padding
        return count - grid[0] * grid[1]

    def _grid(self, inputs: dict[str, Tensor]) -> tuple[int, int]:
        if "spatial_shapes" in inputs:
            rows, columns = inputs["spatial_shapes"][0].tolist()
            return int(rows), int(columns)
        height, width = pair(self.model.config.vision_config.patch_size)
        return inputs["pixel_values"].shape[-2] // height, inputs["pixel_values"].shape[-1] // width

    def _seen(self, image: Image.Image, pixels: Tensor) -> Image.Image:
        """Undo the normalisation; images that the processor cuts into patches stay as they were."""
        if pixels.dim() != 4:
            return image
        values = pixels[0].float().cpu()
        processor = self.processor.image_processor
        mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
        if mean is not None and std is not None:
            values = values * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        else:  # timm's keep theirs elsewhere; contrast is all that is lost
            values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)
        scaled = (255 * values.clamp(0, 1)).round().to(torch.uint8)
        return Image.fromarray(scaled.permute(1, 2, 0).numpy())


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Let a model be used for evaluation, and leave it and all random numbers as they were.

    Modes of every module, which parameters need gradients, their gradients, and the states of
    random number generators are those from before.

    Args:
        model: The model.
    """
    modes = {module: module.training for module in model.modules()}
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in needed:
            parameter.requires_grad_(requires_grad)


def find_model(folder: str | Path, stage: str | None = None) -> Path:
    """Find a model that reads captions, without loading it.

    Args:
        folder: A run of ``hive-vision pretrain`` or ``finetune``, or a model's folder.
        stage: Which stage's model of a run; the last finished one if not given.

    Raises:
        ValueError: Says what the folder is instead.
    """
    folder = Path(folder)
    last, *others = (folder / name / "model" for name in STAGES)
    places = [last, folder / "model", *others, folder]
    wanted = "a run of hive-vision pretrain or finetune"
    if stage is not None:
        places, wanted = [folder / stage / "model"], f"a run that has finished {stage}"
    if not any((place / "config.json").is_file() for place in places):
        _refuse(folder, stage)
    path = first_model(places, str(folder), wanted)
    kind = AutoConfig.from_pretrained(path).model_type
    if kind not in (HiveConfig.model_type, "llava"):
        raise ValueError(
            f"{str(path)!r} is a {kind} model; maps are of models that read captions: give a run "
            "of hive-vision pretrain (hive, cascaded, sa) or finetune"
        )
    return path


def _refuse(folder: Path, stage: str | None) -> None:
    """Say of a run, and of a folder of runs, why there is no model in it."""
    if (folder / "recipe.yaml").is_file():
        finished = [s for s in sorted(STAGES) if (folder / s / "model" / "config.json").is_file()]
        raise ValueError(
            f"{str(folder)!r} is a run that has not finished {stage or 'any stage'} (finished: "
            f"{', '.join(finished) or 'none'}); let it finish, or give a run that has"
        )
    runs = sorted({path.parent for p in ("*", "*/*") for path in folder.glob(f"{p}/recipe.yaml")})
    if runs:
        raise ValueError(
            f"{str(folder)!r} is not a run but a folder of {len(runs)}; give the runs to look "
            f"into, such as {str(runs[0])!r}"
        )


def first_model(places: Sequence[Path], given: str, wanted: str) -> Path:
    """Give the first folder that holds a model.

    Args:
        places: Where it may lie.
        given: What the user gave.
        wanted: What should have been given.

    Raises:
        ValueError: If none does.
    """
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"{given!r} holds no model; give {wanted}, or the folder of its model")
