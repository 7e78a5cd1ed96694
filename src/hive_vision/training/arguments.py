"""What recipes can say. One dataclass for each part of the YAML file."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hive_vision.data.instruction_sources import InstructionSource
from hive_vision.data.sources import Source
from hive_vision.training.miniature import MiniatureSettings

Method = Literal["hive", "cascaded", "sa", "base"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class ModelArguments:
    """The two backbones and how they are joined.

    Args:
        vision: Encoder: hub id or local folder; of CLIP or SigLIP the vision half is taken.
        language: Causal language model with its tokenizer: hub id or local folder.
        layer_selection: Encoder layers that feed the language model: uniform, later, or a list
            counted from 1.
        layer_density: Share of the encoder layers that is selected (the paper's 0.25).
        decoder_layers: Language-model layers that attend to the image; spread evenly if null.
        projector_hidden_size: Width inside the projector; the language model's if null.
        projector_norm: LayerNorm at the projector's entrance.
        projector_residual: Residual connection around the projector's MLP.
        projector_shared: One projector for all layers instead of one each.
        cross_attention_gate: none, or a tanh gate that starts closed.
        cross_attention_qk_norm: Normalise queries and keys of each head.
        cross_attention_start: host copies the language model's own projections, random does not.
        sa_feature_layer: Hidden state that method sa reads, -1 the last, -2 as LLaVA has it.
    """

    vision: str
    language: str
    layer_selection: Literal["uniform", "later"] | list[int] = "uniform"
    layer_density: float = 0.25
    decoder_layers: list[int] | None = None
    projector_hidden_size: int | None = None
    projector_norm: bool = True
    projector_residual: bool = True
    projector_shared: bool = False
    cross_attention_gate: Literal["none", "tanh"] = "none"
    cross_attention_qk_norm: bool = False
    cross_attention_start: Literal["host", "random"] = "host"
    sa_feature_layer: int = -1

    def fusion_options(self, method: Method) -> dict[str, Any]:
        """Options of `HiveConfig` for a method: cascaded reads the last layer only."""
        not_fusion = ("vision", "language", "sa_feature_layer")
        options = {name: value for name, value in vars(self).items() if name not in not_fusion}
        if method == "cascaded":
            options |= {"layer_selection": "last", "projector_shared": True}
        return options


@dataclass
class DataArguments:
    """Captioned images.

    Args:
        train: Folder, file or hub id (see docs/data.md); or a source with keys of its own (path,
            images, format, split, image_column, caption_column, weight); or a list of such
            sources, a mixture.
        validation: Held-out data, given like train; split off from train if null and train has no
            validation split.
        image_column: Column with the images, where train and validation are plain paths.
        caption_column: Column with the captions, where train and validation are plain paths.
        holdout: Share of the images split off when there is no held-out data.
        max_held_out: At most this many held-out samples are used.
        quarantine: File with samples to leave out, as hive-vision data verify writes it.
        max_text_tokens: Longer captions are cut, keeping the end token (the paper's 77).
        group_captions: All captions of an image come together, and it is read and encoded once for
            them; a batch has fewer different images then.
        max_bad_fraction: More unusable samples than this share of the data stop the run.
        num_workers: Processes that read images beside the trainer.
    """

    train: str | Source | list[Source]
    validation: str | Source | list[Source] | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    holdout: float = 0.02
    max_held_out: int = 512
    quarantine: str | None = None
    max_text_tokens: int = 77
    group_captions: bool = False
    max_bad_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no data can have."""
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}; it must be 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"data.max_bad_fraction is {self.max_bad_fraction}; it is a share, from 0 to 1"
            )

    def train_sources(self) -> list[Source]:
        """What to learn from.

        Raises:
            ValueError: If the list is empty.
        """
        sources = self._sources(self.train)
        if not sources:
            raise ValueError("data.train is an empty list; give at least one source")
        return sources

    def validation_sources(self) -> list[Source]:
        """What to judge by; empty if it is to be found in the training sources."""
        return [] if self.validation is None else self._sources(self.validation)

    def _sources(self, given: str | Source | list[Source]) -> list[Source]:
        if isinstance(given, str):
            image, caption = self.image_column, self.caption_column
            return [Source(given, image_column=image, caption_column=caption)]
        return [given] if isinstance(given, Source) else given


@dataclass
class StageArguments:
    """One stage (the paper's Table 3 has three of pre-training, Table 5 two of fine-tuning).

    Args:
        rules: For each parameter group (vision_model, projectors, cross_attentions,
            language_model), or pattern of parameter names, the peak learning rate or frozen. The
            first rule that fits a parameter holds.
        max_steps: Optimiser steps; 0 leaves the stage out. Null: given by epochs.
        epochs: Passes over the data, if max_steps is null.
        batch_size: Global batch size: captions per optimiser step on all devices together.
        warmup: Share of the steps with a rising learning rate.
        min_learning_rate: Share of its peak to which every group's learning rate falls.
        betas: Of AdamW.
        weight_decay: Of AdamW, not applied to biases and norms.
        max_grad_norm: Gradient clipping.
    """

    rules: dict[str, float | Literal["frozen"]] = field(default_factory=dict)
    max_steps: int | None = None
    epochs: float | None = None
    batch_size: int = 256
    warmup: float = 0.03
    min_learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers that no stage can have."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        for part, rate in self.rules.items():
            if rate != "frozen" and not float(rate) >= 0:
                raise ValueError(f"the rate of {part} is {rate}; give 0 or more, or frozen")
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"max_steps is {self.max_steps}; it must be 0 or more")
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; it must be above 0 (1e9 clips nothing)"
            )
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0 (max_steps=0 skips)")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share, at least 0 and below 1")
        if not 0 <= self.min_learning_rate <= 1:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}; it is a share, from 0 to 1"
            )

    def steps(self, samples: int) -> int:
        """Number of optimiser steps on this many samples.

        Raises:
            ValueError: If not exactly one of ``max_steps`` and ``epochs`` is given.
        """
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and epochs is {self.epochs}; "
                "give exactly one of them and set the other to null"
            )
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.batch_size))


@dataclass
class FaultArguments:
    """What a run does about steps that diverge, things that hang, and being asked to stop.

    Args:
        on_divergence: What happens when a loss or gradient is not finite or spikes: stop the run;
            skip that step; or rollback to the last good checkpoint and go on with the data after
            the bad step.
        loss_spike: A loss over this many times the usual one (median of 64 steps) is a spike;
            0 never.
        gradient_spike: The same for the norm of all gradients.
        max_events: After so many skipped steps, or so many rollbacks, the run stops all the same.
        stall_seconds: A loader, step or checkpoint that takes longer ends the run with the stack
            of every thread in a file; 0 never.
        grace_seconds: After SIGTERM the step is finished and saved; if that takes longer, the run
            ends and goes on later from its last checkpoint.
    """

    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    loss_spike: float = 0.0
    gradient_spike: float = 0.0
    max_events: int = 3
    stall_seconds: float = 1800.0
    grace_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("loss_spike", "gradient_spike"):
            value = getattr(self, name)
            if value and value <= 1:
                raise ValueError(f"{name} is {value}; give a factor above 1, or 0 to never look")
        for name in ("max_events", "stall_seconds", "grace_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(kw_only=True)
class RunArguments:
    """What every run can be told, whatever it trains.

    Args:
        output: Run folder.
        seed: Of the data order and of everything that starts at random.
        micro_batch_size: At most this many samples at once on one device; the rest is
            accumulated.
        precision: Of the products; auto takes bfloat16 on GPUs that have it and on CPUs with AMX,
            float32 elsewhere.
        attention: auto takes PyTorch's fused attention, on a CPU in bfloat16 with a faster backward
            pass; or one that transformers knows, such as eager or flash_attention_2.
        compile: Compile each block with torch.compile; the first steps take minutes then.
        sharding: With several processes, none keeps the whole model on each (DDP), fsdp2 a part.
        cache_features: Where stages freeze the encoder, compute its features of each image once and
            keep them on the disk until the last of these stages ends: always, never, or auto where
            it saves more time than it takes and needs at most half of the free disk.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        keep_freed_memory: On a CPU, keep the memory that a step frees for the next one (where the C
            library is glibc).
        log_every: Steps between lines in metrics.jsonl.
        evaluate_every: Steps between held-out losses inside a stage; 0 for after it only.
        gradients_every: Steps between records of the gradient's norm at every encoder layer, in
            metrics.jsonl (of the main process's images); 0 for none.
        save_every: Steps between checkpoints; 0 for the end of a stage only.
        faults: Divergence, stalls, and being asked to stop.
        miniature: Data and models that are drawn and trained first, if their folder is not there.
    """

    output: str
    seed: int = 0
    micro_batch_size: int = 64
    precision: Precision = "auto"
    attention: str = "auto"
    compile: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    cache_features: Literal["auto", "always", "never"] = "auto"
    gradient_checkpointing: bool = False
    keep_freed_memory: bool = True
    log_every: int = 10
    evaluate_every: int = 0
    gradients_every: int = 0
    save_every: int = 0
    faults: FaultArguments = field(default_factory=FaultArguments)
    miniature: MiniatureSettings | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        for name in ("micro_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("save_every", "evaluate_every", "gradients_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.precision == "float16" and self.faults.on_divergence != "stop":
            raise ValueError(
                f"faults.on_divergence is {self.faults.on_divergence!r} but precision is float16, "
                "whose loss scaler leaves such steps out by itself; use stop, or bfloat16"
            )

    @property
    def stages(self) -> dict[str, StageArguments]:
        """The stages in their order."""
        raise NotImplementedError


@dataclass(kw_only=True)
class PretrainArguments(RunArguments):
    """A pre-training recipe.

    Args:
        model: The backbones.
        data: The captioned images.
        method: hive, cascaded, sa, or base (nothing is trained).
        stage1: Projector.
        stage2: Projector and language model.
        stage3: Everything.
        probe_after_stage: Classification sets (as hive-vision probe takes them) on which the
            encoder is compared with the one it started from after each stage that trains it; a
            warning says if it got worse.
    """

    model: ModelArguments
    data: DataArguments
    method: Method = "hive"
    stage1: StageArguments = field(default_factory=StageArguments)
    stage2: StageArguments = field(default_factory=StageArguments)
    stage3: StageArguments = field(default_factory=StageArguments)
    probe_after_stage: list[str] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, StageArguments]:
        """The stages in their order."""
        return {"stage1": self.stage1, "stage2": self.stage2, "stage3": self.stage3}


@dataclass
class InstructionArguments:
    """Conversations about images.

    Args:
        train: LLaVA's json file, folder, parquet file or hub id; or a source with keys of its own
            (path, images, split, image_column, conversation_column, weight); or a list of such
            sources, a mixture.
        validation: Held-out data, given like train; split off from train if null.
        holdout: Share of the conversations split off when there is no held-out data.
        max_held_out: At most this many held-out conversations are used.
        max_tokens: Longer conversations are cut, never inside an image; images count with all of
            their tokens.
        max_unlearned_fraction: More conversations than this share with nothing to learn from stop
            the run before its first step.
        max_bad_fraction: More unusable samples than this share of the data stop the run.
        num_workers: Processes that read images beside the trainer.
    """

    train: str | InstructionSource | list[InstructionSource]
    validation: str | InstructionSource | list[InstructionSource] | None = None
    holdout: float = 0.02
    max_held_out: int = 512
    max_tokens: int = 2048
    max_unlearned_fraction: float = 0.001
    max_bad_fraction: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no data can have."""
        for name in ("max_unlearned_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must be 0 or more")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")

    def train_sources(self) -> list[InstructionSource]:
        """What to learn from.

        Raises:
            ValueError: If the list is empty.
        """
        sources = _instruction_sources(self.train)
        if not sources:
            raise ValueError("train is an empty list; give at least one source")
        return sources

    def validation_sources(self) -> list[InstructionSource]:
        """What to judge by; empty if it is to be split off."""
        return [] if self.validation is None else _instruction_sources(self.validation)


def _instruction_sources(
    given: str | InstructionSource | list[InstructionSource],
) -> list[InstructionSource]:
    if isinstance(given, str):
        return [InstructionSource(given)]
    return [given] if isinstance(given, InstructionSource) else given


@dataclass
class VlmArguments:
    """The two backbones of a LLaVA-style model.

    Args:
        vision: Encoder folder (a run's ``encoder``) or hub id; of CLIP or SigLIP the vision half.
        language: Causal language model with its tokenizer: hub id or local folder.
        feature_layer: Hidden state that is read, -1 the last (paper section 3.6), -2 LLaVA's.
        chat_template: llava for LLaVA's own, or a file with a jinja template; the tokenizer's if
            null.
    """

    vision: str
    language: str
    feature_layer: int = -1
    chat_template: str | None = None


@dataclass
class FinetuneData:
    """What each stage of fine-tuning reads.

    Args:
        stage1: For the connector: captions as conversations.
        stage2: For the language model: instructions.
    """

    stage1: InstructionArguments
    stage2: InstructionArguments


@dataclass(kw_only=True)
class FinetuneArguments(RunArguments):
    """A recipe for a LLaVA-style model on an encoder (the paper's section 4.3 and Table 5).

    Args:
        model: The backbones.
        data: The conversations.
        stage1: Connector.
        stage2: Language model, with the encoder frozen.
        train_connector: Train the connector in stage 2 too, at the language model's rate, as LLaVA
            and the authors' code do; the paper does not.
    """

    model: VlmArguments
    data: FinetuneData
    stage1: StageArguments = field(default_factory=StageArguments)
    stage2: StageArguments = field(default_factory=StageArguments)
    train_connector: bool = False

    @property
    def stages(self) -> dict[str, StageArguments]:
        """The stages in their order."""
        second = self.stage2
        if self.train_connector:
            rate = second.rules.get("language_model", "frozen")
            second = replace(second, rules={**second.rules, "projectors": rate})
        return {"stage1": self.stage1, "stage2": second}
