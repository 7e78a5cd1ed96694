"""From samples to the tensors that a model reads.

Shapes: B captions or conversations, I images, T tokens of the longest one in the batch, P
placeholder tokens of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hive_vision.data.captions import Caption
from hive_vision.data.instructions import Instruction

IGNORE_INDEX = -100


@dataclass(frozen=True)
class CaptionCollator:
    """Stack images and pad captions on the right; supervise the caption and its end.

    With start token 1, end token 2, padding 0 and the captions ``[5, 6]`` and ``[7]``::

        input_ids       1  5  6  2      attention_mask  1 1 1 1     labels  .  5  6  2
                        1  7  2  0                      1 1 1 0             .  7  2  .

    where ``.`` is -100. For ``sa`` the P placeholder tokens stand after the start token and
    are not supervised either, so every method learns from exactly the same tokens.

    Samples that share one image object (``CaptionDataset`` with ``group_captions``) have it
    stacked once.

    Args:
        image_processor: The encoder's.
        pad_token_id: Fills ``input_ids``; never decides what is supervised.
        image_tokens: Placeholder ids that ``sa`` puts before the caption.
    """

    image_processor: Any
    pad_token_id: int
    image_tokens: tuple[int, ...] = ()

    def __call__(self, samples: Sequence[Caption]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            What the image processor gives: ``pixel_values`` (I, C, H, W), or padded patches
            with their mask and shapes; or ``encoder_features`` (I, S, N, D); where I < B,
            ``image_index`` (B,), which image belongs to each caption; ``input_ids``,
            ``attention_mask`` and ``labels`` (B, P + T); for the trainer the lists ``sample_ids``
            and ``bad_samples``.
        """
        rows = []
        for sample in samples:
            start, *caption = sample["input_ids"]
            rows.append([start, *self.image_tokens, *caption])
        width = max(map(len, rows))
        padded = [[*row, *[self.pad_token_id] * (width - len(row))] for row in rows]
        input_ids, places = torch.tensor(padded), torch.arange(width)
        is_real = places < torch.tensor([[len(row)] for row in rows])
        is_learned = is_real & (places > len(self.image_tokens))
        images, which = _distinct([sample["image"] for sample in samples])
        return {
            **_stack(images, self.image_processor),
            **({"image_index": torch.tensor(which)} if len(images) < len(samples) else {}),
            "input_ids": input_ids,
            "attention_mask": is_real.long(),
            "labels": input_ids.where(is_learned, IGNORE_INDEX),
            "sample_ids": [sample["sample_id"] for sample in samples],
            "bad_samples": [bad for sample in samples for bad in sample["bad_samples"]],
        }


def _stack(images: Sequence[Image.Image | Tensor], image_processor: Any) -> dict[str, Tensor]:
    """Prepare images; put features that are given instead of them into one tensor."""
    features = [image for image in images if isinstance(image, Tensor)]
    if features:
        return {"encoder_features": torch.stack(features)}
    return trim_patches(image_processor(images, return_tensors="pt"))


def _distinct(
    images: Sequence[Image.Image | Tensor],
) -> tuple[list[Image.Image | Tensor], list[int]]:
    """Every image object once, and which of them stands at each place."""
    distinct = {id(image): image for image in images}
    numbers = {key: number for number, key in enumerate(distinct)}
    return list(distinct.values()), [numbers[id(image)] for image in images]


@dataclass(frozen=True)
class InstructionCollator:
    """Stack the images of conversations, put their tokens in place, and pad on the right.

    A batch without any image gets a blank one behind its first conversation, where no token attends
    to it: the connector has a gradient (of zero) in every step, for which the other processes of a
    distributed run wait. It is encoded also where features are stored.

    Args:
        image_processor: The encoder's.
        pad_token_id: Fills ``input_ids``; never decides what is supervised.
        image_token_id: Of ``<image>``.
        image_tokens: P.
    """

    image_processor: Any
    pad_token_id: int
    image_token_id: int
    image_tokens: int

    def __call__(self, samples: Sequence[Instruction]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``pixel_values`` (images of all samples, C, H, W), or ``encoder_features`` (images of
            all samples, S, N, D); ``input_ids``, ``attention_mask`` and
            ``labels`` (B, T with images); for the trainer ``sample_ids`` and ``bad_samples``.
        """
        images: list[Image.Image | Tensor]
        images = [image for sample in samples for image in sample["images"]]
        rows = [self._with_images(sample) for sample in samples]
        lengths = [len(ids) for ids, _ in rows]
        if not images:
            images = [Image.new("RGB", (64, 64))]
            rows[0][0].extend([self.image_token_id] * self.image_tokens)
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        for row, (ids, learned) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            for start, stop in learned:
                labels[row, start:stop] = input_ids[row, start:stop]
        return {
            **_stack(images, self.image_processor),
            "input_ids": input_ids,
            "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
            "labels": labels,
            "sample_ids": [sample["sample_id"] for sample in samples],
            "bad_samples": [bad for sample in samples for bad in sample["bad_samples"]],
        }

    def _with_images(self, sample: Instruction) -> tuple[list[int], list[tuple[int, int]]]:
        """Repeat each image's token; tokens, and where they are learned now."""
        ids: list[int] = []
        places = []  # where each token of the sample is now
        for token in sample["input_ids"]:
            places.append(len(ids))
            ids += [token] * (self.image_tokens if token == self.image_token_id else 1)
        places.append(len(ids))
        return ids, [(places[start], places[stop]) for start, stop in sample["learned"]]


def trim_patches(images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the padding that every image of a batch has; nothing to do for images of one size.

    Args:
        images: From an image processor; where images are cut into patches, those (B, N, ...)
            and ``pixel_attention_mask`` (B, N).
    """
    mask = images.get("pixel_attention_mask")
    if mask is None or images["pixel_values"].shape[:2] != mask.shape:
        return dict(images)
    used = int(mask.any(dim=0).nonzero().max()) + 1
    trimmed = {name: images[name][:, :used] for name in ("pixel_values", "pixel_attention_mask")}
    return {**images, **trimmed}
