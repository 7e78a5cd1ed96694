"""What a probe can be told."""

from dataclasses import dataclass, field
from typing import Any, Literal

WHOLE_MODEL = ("zero_shot", "retrieval")  # what no encoder alone can do


@dataclass(frozen=True)
class FastProtocol:
    """Features are computed once, without augmentation; only the head is trained on them.

    Every choice is made for each seed on a part of the training images; then the head is trained
    on all of them. A linear head is scikit-learn's logistic regression on standardised features,
    solved to its optimum, so that no learning rate decides; an attentive one is trained with
    AdamW, cosine to 0.

    Args:
        inverse_penalties: Linear: values of C to choose from, as in scikit-learn.
        max_iterations: Linear: of the solver (L-BFGS).
        learning_rates: Attentive: to choose from.
        weight_decays: Attentive: to choose from; not applied to biases and norms.
        epochs: Attentive: passes over the training images.
        min_steps: Attentive: at least so many steps, for small sets.
        batch_size: Attentive: images in a step.
        holdout: Share of the training images that choices are made on.
    """

    inverse_penalties: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    max_iterations: int = 1000
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    weight_decays: tuple[float, ...] = (0.01, 0.1)
    epochs: int = 20
    min_steps: int = 300
    batch_size: int = 256
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be chosen with."""
        for name in ("inverse_penalties", "learning_rates", "weight_decays"):
            if not getattr(self, name):
                raise ValueError(f"fast.{name} is empty; give at least one number")
            if min(getattr(self, name)) <= 0 and name != "weight_decays":
                raise ValueError(
                    f"fast.{name} has {min(getattr(self, name))}; give numbers above 0"
                )
        if not 0 < self.holdout < 1:
            raise ValueError(f"fast.holdout is {self.holdout}; it is a share between 0 and 1")
        _at_least_one(self, "fast", "max_iterations", "epochs", "batch_size")
        if self.min_steps < 0:
            raise ValueError(f"fast.min_steps is {self.min_steps}; it must be 0 or more")


@dataclass(frozen=True)
class PaperProtocol:
    """Table 4 of the paper: AdamW, linear warmup, cosine to 0, augmented training images.

    Args:
        learning_rate: Peak.
        weight_decay: Not applied to biases and norms.
        betas: Of AdamW.
        batch_size: Images in a step.
        micro_batch_size: At most so many at once; the rest is accumulated.
        max_grad_norm: Gradient clipping.
        warmup_epochs: Passes with a rising learning rate.
        epochs: Passes over the training images. The paper does not say: 1.5 epochs are 3% of 50,
            and the authors' scripts have 1 and 5.
        crop_scale: Share of the image that a random crop keeps.
        crop_ratio: Width to height of a random crop.
        flip: Probability of a horizontal flip.
        jitter: Of brightness, contrast and saturation.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = 512
    micro_batch_size: int = 64
    max_grad_norm: float = 3.0
    warmup_epochs: float = 1.5
    epochs: float = 50.0
    crop_scale: tuple[float, float] = (0.4, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.33)
    flip: float = 0.5
    jitter: float = 0.2

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be trained with."""
        _at_least_one(self, "paper", "batch_size", "micro_batch_size")
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"paper.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"paper.flip is {self.flip}; it is a probability, from 0 to 1")


def _at_least_one(settings: Any, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            value = getattr(settings, name)
            raise ValueError(f"{prefix}.{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class ProbeArguments:
    """How encoders are probed.

    Args:
        probe: linear; attentive, one learned query over all tokens; knn, which trains nothing.
            Of a whole CLIP or SigLIP also zero_shot, which names the class, and retrieval of
            captioned images.
        protocol: fast trains on features that are computed once; paper is Table 4.
        layer: Encoder layer that is read: last, penultimate (as the authors' code), or a number
            from 1.
        pooling: Of linear and knn: mean of the patch tokens, cls, or head, the encoder's own
            pooling head, which pre-training does not touch.
        keep_prefix: Count CLS and register tokens among the tokens; the authors' code does not.
        seeds: One head each; a seed drives its start, the order of the images, and the part that
            learning rate and weight decay are chosen on.
        neighbours: Of knn, by cosine similarity.
        templates: Of zero_shot: texts with {} where the class's name goes.
        fast: Numbers of protocol fast.
        paper: Numbers of protocol paper.
        image_column: Column with the images; found if null.
        label_column: Column with the class numbers; found if null.
        caption_column: Of retrieval: column with the captions.
        train_split: Split to train on; found if null.
        test_split: Split to judge by; found if null.
        precision: Of the encoder.
        batch_size: Images at once where features are computed.
        num_workers: Processes that decode images; null for none without a GPU.
        cache: Folder of the features; null for ~/.cache/hive-vision/features.
    """

    probe: Literal["linear", "attentive", "knn", "zero_shot", "retrieval"] = "linear"
    protocol: Literal["fast", "paper"] = "fast"
    layer: Literal["last", "penultimate"] | int = "last"
    pooling: Literal["mean", "cls", "head"] = "mean"
    keep_prefix: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    neighbours: int = 5
    templates: tuple[str, ...] = ("a photo of a {}.",)
    fast: FastProtocol = field(default_factory=FastProtocol)
    paper: PaperProtocol = field(default_factory=PaperProtocol)
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str = "caption"
    train_split: str | None = None
    test_split: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 128
    num_workers: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no probe can have."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds is {list(self.seeds)}; give at least one, each once, e.g. seeds=0,1,2"
            )
        if min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}; give numbers from 0")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must be 0 or more")
        if self.probe == "knn" and self.protocol == "paper":
            raise ValueError(
                "probe is knn, which trains nothing, but protocol is paper; leave one out"
            )
        if self.probe == "attentive" and self.pooling != "mean":
            raise ValueError(
                f"pooling is {self.pooling} but probe=attentive attends to all tokens itself; "
                "leave pooling out, or choose probe=linear"
            )
        for name in ("neighbours", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
