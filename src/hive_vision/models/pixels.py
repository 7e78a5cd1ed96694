"""An image processor in two parts: resizing where images are read, floats where they are used.

Shapes: B images of C channels, H x W pixels.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend

_TRIALS = ((75, 50), (50, 75), (64, 64))  # width and height: wide, high, square


class SplitProcessor:
    """Prepares images as an image processor does, to the bit, but carries bytes between processes.

    A loader's workers resize and give uint8, a quarter of the memory to hand over; whoever has the
    batch on its device rescales and normalises there. Processors that cannot be split (PIL's,
    timm's, those that cut images into patches) do everything at once as ever.

    Args:
        image_processor: As it came with the encoder.

    Attributes:
        is_split: Whether workers give bytes.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        # Tried, not looked up: one that rescales before it resizes, or pads after it normalises,
        # gives other numbers in two parts.
        self.is_split = isinstance(image_processor, TorchvisionBackend) and all(
            self._agrees(*size) for size in _TRIALS
        )

    @property
    def resized_to(self) -> int | None:
        """Longest side that it is told to resize to, in pixels; ``None`` if it does not say."""
        size = self.image_processor.to_dict().get("size") or {}
        return max((side for side in size.values() if side), default=None)

    def __call__(self, images: Any, return_tensors: Literal["pt"] = "pt") -> BatchFeature:
        """Do what belongs into a loader's workers.

        Args:
            images: One image or a list of them.
            return_tensors: There for whoever calls it as an image processor.

        Returns:
            ``pixel_values`` (B, C, H, W), uint8 if it is split, and what else the processor gives.
        """
        return self._resize(images) if self.is_split else self._whole(images)

    def normalize(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Do the rest, wherever the inputs are.

        Args:
            inputs: A model's. Without images, or with what the whole processor gave, they stay.

        Returns:
            The same, with ``pixel_values`` (B, C, H, W) as the whole processor gives them.
        """
        pixels = inputs.get("pixel_values")
        if not self.is_split or pixels is None or pixels.dtype != torch.uint8:
            return dict(inputs)
        return {**inputs, "pixel_values": self._normalize(pixels)}

    def _whole(self, images: Any) -> BatchFeature:
        return self.image_processor(images, return_tensors="pt")

    def _resize(self, images: Any) -> BatchFeature:
        return self.image_processor(
            images, return_tensors="pt", do_rescale=False, do_normalize=False
        )

    def _normalize(self, pixels: Tensor) -> Tensor:
        """Call the processor's own last step, which fuses rescaling and normalisation."""
        processor = self.image_processor
        mean, std = processor.image_mean, processor.image_std
        normalized: Tensor = processor.rescale_and_normalize(
            pixels,
            processor.do_rescale,
            processor.rescale_factor,
            processor.do_normalize,
            tuple(mean) if isinstance(mean, list) else mean,  # remembered by them
            tuple(std) if isinstance(std, list) else std,
        )
        return normalized

    def _agrees(self, width: int, height: int) -> bool:
        """Whether both parts make exactly what the whole makes of an image of noise."""
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        whole = self._whole(image)
        try:
            parts = self._resize(image)
            pixels = parts["pixel_values"]
            is_bytes = pixels.dtype == torch.uint8 and pixels.dim() == 4
            return (
                whole.keys() == parts.keys()
                and is_bytes
                and torch.equal(self._normalize(pixels), whole["pixel_values"])
            )
        except (TypeError, ValueError, RuntimeError):  # one with steps of its own refuses bytes
            return False
