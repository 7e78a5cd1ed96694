"""What was seen inside of several models: what figures, tables and sentences are made of.

Shapes: n samples, L encoder layers, S attending layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hive_vision.analysis.attention import Pointing
from hive_vision.analysis.gradient_flow import GradientFlow
from hive_vision.analysis.maps import AttentionMaps, GradientMaps

ALL_STAGES = "all"


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its caption, and its name in the data."""

    name: str
    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Shown:
    """Maps of one sample.

    Attributes:
        picture: The sample.
        seen: The image as the encoders see it.
        tokens: Model -> the caption's tokens.
        gradients: Model -> its gradient maps.
        attention: Model -> its attention maps.
    """

    picture: CaptionedImage
    seen: Image.Image
    tokens: Mapping[str, tuple[str, ...]]
    gradients: Mapping[str, GradientMaps]
    attention: Mapping[str, AttentionMaps]


@dataclass(frozen=True)
class AttentionNumbers:
    """Attention over n samples.

    Attributes:
        entropy: (n, S) averaged over heads.
        distance: (n, S) likewise.
        patches: (n, S) likewise.
        pointing: Of each image whose named objects are known; empty without masks.
        layers: S language-model layers, 1-based.
    """

    entropy: NDArray[np.float64]
    distance: NDArray[np.float64]
    patches: NDArray[np.float64]
    pointing: Sequence[Pointing]
    layers: Sequence[int]


@dataclass(frozen=True)
class MapFindings:
    """Everything that was looked at, of all models.

    Attributes:
        models: Name -> folder.
        shown: Maps of samples.
        flows: Model -> gradient flow.
        numbers: Model -> attention in numbers.
        updates: Model -> stage -> (L,) relative weight update; of all stages together too.
        cka: (encoder, encoder) -> (L, L').
        images: How many images the CKA is over.
        data: What the numbers are over.
        encoder_training: Model -> how long and at which rate its encoder was trained, where there
            are updates.
    """

    models: Mapping[str, str]
    shown: Sequence[Shown]
    flows: Mapping[str, GradientFlow]
    numbers: Mapping[str, AttentionNumbers]
    updates: Mapping[str, Mapping[str, NDArray[np.float64]]]
    cka: Mapping[tuple[str, str], NDArray[np.float64]]
    images: int
    data: str
    encoder_training: Mapping[str, str] = field(default_factory=dict)
