"""What can be asked of maps; read before the libraries that answer it are loaded."""

from dataclasses import dataclass, field
from typing import Literal

# What is allowed where words of a kind are, for messages.
CHOICES = {
    "heads": "mean, max, or the number of one",
    "scale": "own, shared",
    "stage": "stage1, stage2, stage3",
}


@dataclass(frozen=True)
class MapsArguments:
    """What to look at.

    Args:
        image: One image file, with its caption, instead of samples of a data set.
        caption: Its caption.
        data: Captioned images, as recipes take them; the first run's held-out ones if null.
        split: Split of the data; validation if there is one.
        masks: Folder with masks of the same images, as the miniature has them: do words look at
            what they name?
        samples: Samples of the data that maps are drawn of.
        flow_samples: Samples that numbers are measured over; 0 for none.
        stage: Which stage's models; the last finished ones if null.
        heads: mean or max of all heads, or the number of one.
        tokens: Words whose attention is shown; some of the caption's if empty.
        layers: Attending language-model layers that are shown; at most six, evenly, if empty.
        scale: own stretches each map by itself, shared all of a figure alike.
        cka: Compare the layers of encoders with each other and the base, from four samples on.
    """

    image: str | None = None
    caption: str | None = None
    data: str | None = None
    split: str | None = None
    masks: str | None = None
    samples: int = 3
    flow_samples: int = 64
    stage: Literal["stage1", "stage2", "stage3"] | None = None
    heads: Literal["mean", "max"] | int = "mean"
    tokens: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    scale: Literal["own", "shared"] = "own"
    cka: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if (self.image is None) != (self.caption is None):
            raise ValueError("image and caption belong together; give both, or data=FOLDER")
        if self.caption is not None and not self.caption.strip():
            raise ValueError("caption is empty; there is no loss to differentiate")
        if self.image is not None and self.data is not None:
            raise ValueError("give image and caption, or data; not both")
        for name, least in (("samples", 0), ("flow_samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.image is None and not (self.samples or self.flow_samples):
            raise ValueError("samples and flow_samples are 0: there is nothing to look at")
        if self.flow_samples == 1:
            raise ValueError("flow_samples is 1; give at least 2, so that there is an interval")
        if self.masks is not None and self.image is not None:
            raise ValueError("masks are of a data set; give data instead of image")
