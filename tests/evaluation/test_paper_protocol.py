"""The paper's protocol against its Table 4, and runs of it on a tiny encoder."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import InterpolationMode
from transformers import Trainer, TrainerCallback

from hive_vision.data.classification import ClassificationSet, LabelledImages
from hive_vision.evaluation.arguments import PaperProtocol, ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder, Reading
from hive_vision.evaluation.paper_protocol import (
    FOUND,
    FrozenEncoderClassifier,
    augmentation,
    probe_paper,
    training_arguments,
)
from hive_vision.evaluation.probe import probe_encoder
from hive_vision.models.probes import AttentiveProbe, LinearProbe
from tests.evaluation.helpers import colour_set, noise

QUICK = PaperProtocol(
    learning_rate=2e-2, batch_size=16, micro_batch_size=16, warmup_epochs=1, epochs=3
)
TOKENS = Reading(8, "tokens")


@pytest.fixture(scope="module")
def encoder(backbone_folders: dict[str, Path]) -> FrozenEncoder:
    return FrozenEncoder.load(backbone_folders["siglip"])


@pytest.fixture(scope="module")
def data() -> ClassificationSet:
    return colour_set(30, 18)


def message(failing: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as failure:  # noqa: PT011  returned
        failing()
    assert "\n" not in str(failure.value)
    return str(failure.value)


class TestTable4:
    def test_numbers(self, tmp_path: Path) -> None:
        arguments = training_arguments(PaperProtocol(), 50_000, 7, tmp_path, 1, True)
        assert arguments.optim in ("adamw_torch", "adamw_torch_fused")
        assert arguments.learning_rate == 2e-4
        assert arguments.weight_decay == 0.01
        assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.999)
        assert arguments.max_grad_norm == 3.0
        assert arguments.lr_scheduler_type == "cosine"
        assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 512
        assert arguments.warmup_steps == 147  # 1.5 passes of 98 steps
        assert arguments.num_train_epochs == 50
        assert (arguments.seed, arguments.data_seed) == (7, 7)

    @pytest.mark.parametrize(
        ("batch_size", "micro", "at_once"), [(512, 64, 64), (512, 48, 16), (32, 64, 32), (6, 4, 2)]
    )
    def test_a_step_has_all_its_images(
        self, batch_size: int, micro: int, at_once: int, tmp_path: Path
    ) -> None:
        settings = PaperProtocol(batch_size=batch_size, micro_batch_size=micro)
        arguments = training_arguments(settings, 1000, 0, tmp_path, 1, True)
        assert arguments.per_device_train_batch_size == at_once
        assert arguments.gradient_accumulation_steps * at_once == batch_size

    def test_augmentation(self) -> None:
        crop, flip, jitter = augmentation(PaperProtocol(), (48, 64)).transforms
        assert (crop.size, crop.scale, crop.ratio) == ((48, 64), (0.4, 1.0), (0.75, 1.33))
        assert crop.interpolation == InterpolationMode.BICUBIC
        assert flip.p == 0.5
        assert jitter.brightness == jitter.contrast == jitter.saturation == (0.8, 1.2)
        assert jitter.hue is None

    def test_augmented_images(self) -> None:
        """Another one each time, of the encoder's size, in the range of colours."""
        image = noise(1, shape=(50, 30))[0]
        augment = augmentation(PaperProtocol(), (32, 24))
        seen = {augment(image).tobytes() for _ in range(5)}
        assert augment(image).size == (24, 32)
        assert len(seen) == 5
        still = augmentation(
            PaperProtocol(crop_scale=(1, 1), crop_ratio=(0.6, 0.6), flip=0, jitter=0), (50, 30)
        )
        assert still(image).tobytes() == image.tobytes()


@dataclass
class Recorder(TrainerCallback):
    """Learning rates and parameter groups as they are used."""

    rates: list[float] = field(default_factory=list)
    decays: dict[int, float] = field(default_factory=dict)
    optimizer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"]
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        for group in self.optimizer.param_groups:
            self.decays |= {id(parameter): group["weight_decay"] for parameter in group["params"]}


@dataclass
class Collect:
    """Items of (features, label) to a batch."""

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"x": torch.ones(len(rows), 6, 8), "labels": torch.tensor(rows) % 3}


class HeadAlone(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.head(x), labels)}


class TestOptimiser:
    def trained(self, settings: PaperProtocol, folder: Path, head: nn.Module) -> Recorder:
        arguments = training_arguments(settings, 100, 0, folder, 1, True)
        arguments.save_strategy = "no"
        recorder = Recorder()
        trainer = Trainer(
            HeadAlone(head),
            arguments,
            train_dataset=list(range(100)),
            data_collator=Collect(),
            callbacks=[recorder],
        )
        trainer.train()
        return recorder

    @pytest.mark.parametrize("micro", [16, 4])
    def test_learning_rate_of_each_step(self, tmp_path: Path, micro: int) -> None:
        """100 images are 7 steps of 16 (the last one of 4); 1.5 and 4 passes of them."""
        settings = PaperProtocol(batch_size=16, micro_batch_size=micro, epochs=4, warmup_epochs=1.5)
        recorder = self.trained(settings, tmp_path, LinearProbe(8, 3))
        warmup, total = 10, 28
        expected = [
            2e-4 * step / warmup
            if step < warmup
            else 1e-4 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            for step in range(total)
        ]
        assert recorder.rates == pytest.approx(expected, abs=1e-12)
        assert recorder.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("make", [lambda: LinearProbe(8, 3), lambda: AttentiveProbe(8, 3, 2)])
    def test_biases_and_norms_do_not_decay(
        self, tmp_path: Path, make: Callable[[], nn.Module]
    ) -> None:
        head = make()
        settings = PaperProtocol(batch_size=50, micro_batch_size=50, epochs=2, warmup_epochs=1)
        recorder = self.trained(settings, tmp_path, head)
        assert isinstance(getattr(recorder.optimizer, "optimizer", None), torch.optim.AdamW)
        decays = {name: recorder.decays[id(p)] for name, p in head.named_parameters()}
        assert decays == {
            name: 0.01 if parameter.dim() > 1 else 0.0
            for name, parameter in head.named_parameters()
        }


class TestClassifier:
    @pytest.mark.parametrize("reading", [TOKENS, Reading(8, "head"), Reading(3, "tokens")])
    def test_is_the_head_on_the_encoder(self, encoder: FrozenEncoder, reading: Reading) -> None:
        torch.manual_seed(0)
        classifier = FrozenEncoderClassifier(encoder, reading, LinearProbe(32, 3))
        pixels = torch.randn(5, 3, 32, 32)
        with torch.no_grad():
            output = encoder.model(pixels, output_hidden_states=True)
        tokens = output.hidden_states[reading.layer]
        tokens = output.pooler_output[:, None] if reading.pooling == "head" else tokens
        expected = classifier.head(tokens)
        labels = torch.tensor([0, 1, 2, 1, 0])
        found = classifier(pixel_values=pixels, labels=labels)
        torch.testing.assert_close(found["logits"], expected)
        torch.testing.assert_close(found["loss"], cross_entropy(expected, labels))
        assert set(classifier(pixel_values=pixels)) == {"logits"}

    def test_the_encoder_is_no_part_of_it(self, encoder: FrozenEncoder) -> None:
        classifier = FrozenEncoderClassifier(encoder, TOKENS, LinearProbe(32, 3))
        assert {name.partition(".")[0] for name in classifier.state_dict()} == {"head"}
        classifier.train()
        assert not encoder.model.training
        classifier(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1]))[
            "loss"
        ].backward()
        assert all(parameter.grad is None for parameter in encoder.model.parameters())


@dataclass
class Heads:
    """Makes heads and keeps them, to look at when they are trained."""

    make: Callable[[], nn.Module] = field(default=lambda: LinearProbe(32, 3))
    made: list[nn.Module] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)

    def __call__(self) -> nn.Module:
        self.made.append(self.make())
        self.starts.append(self.weights[-1].clone())
        return self.made[-1]

    @property
    def weights(self) -> list[Tensor]:
        return [nn.utils.parameters_to_vector(head.parameters()).detach() for head in self.made]


def run(
    encoder: FrozenEncoder,
    data: ClassificationSet,
    work: Path,
    settings: PaperProtocol = QUICK,
    seeds: tuple[int, ...] = (0,),
    workers: int = 1,
    heads: Heads | None = None,
) -> tuple[Any, list[Tensor]]:
    heads = heads or Heads()
    outcome = probe_paper(encoder, TOKENS, data, heads, settings, seeds, work, workers)
    return outcome, heads.weights


class Interruption(BaseException):
    """Like a KeyboardInterrupt, which would end the tests too if nothing expected it."""


class Interrupting(LabelledImages):
    """Stops the run when so many images have been read."""

    left = 0

    def __getitem__(self, row: int) -> Any:
        type(self).left -= 1
        if type(self).left < 0:
            raise Interruption
        return super().__getitem__(row)


def interrupting(data: ClassificationSet, after: int) -> ClassificationSet:
    Interrupting.left = after
    train = data.train
    return replace(data, train=Interrupting(train.name, train.images, train.labels))


class TestRuns:
    @pytest.mark.parametrize("probe", ["linear", "attentive"])
    def test_learns_and_leaves_the_encoder_alone(
        self, probe: str, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
        arguments = ProbeArguments(
            probe=probe,
            protocol="paper",
            paper=replace(QUICK, epochs=8),
            seeds=(0,),
            cache=str(tmp_path / "features"),
        )
        result = probe_encoder(encoder, data, arguments)
        assert result.correct.shape == (1, 18)
        assert result.accuracy.mean > 0.8
        assert result.settings["protocol"] == "paper"
        assert result.settings["epochs"] == 8
        assert {path.name for path in tmp_path.rglob("*.npy")} == {FOUND}, "no features are kept"
        assert not list(tmp_path.rglob("checkpoint-*")), "nor what an interrupted run goes on from"
        after = encoder.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_the_seed_makes_the_head(
        self, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        short, heads = replace(QUICK, epochs=1.5), Heads()
        outcome, (first, second) = run(encoder, data, tmp_path / "a", short, (0, 1), heads=heads)
        assert (outcome.seeds, outcome.correct.shape) == ((0, 1), (2, 18))
        again, (third,) = run(encoder, data, tmp_path / "b", short, (1,), heads=(other := Heads()))
        assert torch.equal(second, third)
        np.testing.assert_array_equal(outcome.correct[1], again.correct[0])
        assert not torch.equal(first, second)
        assert torch.equal(heads.starts[1], other.starts[0])
        assert not torch.equal(*heads.starts)
        still = replace(short, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0)
        _, (plain,) = run(encoder, data, tmp_path / "c", still, (1,))
        assert not torch.equal(plain, third), "the others were augmented"

    def test_judges_plain_test_images_and_says_where_it_stands(
        self,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        heads = Heads()
        with caplog.at_level(logging.INFO, "hive_vision"):
            outcome, _ = run(encoder, data, tmp_path / "a", seeds=(5,), heads=heads)
        images = [data.test[row] for row in range(18)]
        inputs = encoder.image_processor(images, return_tensors="pt")
        (tokens,) = encoder.read(inputs, [TOKENS])
        predicted = heads.made[0](tokens).argmax(dim=1).numpy()
        np.testing.assert_array_equal(outcome.correct[0], predicted == data.test.labels)
        lines = [r.getMessage() for r in caplog.records if r.name.startswith("hive_vision")]
        assert len(lines) == 3
        assert f"{encoder.name} on colours, seed 5: epoch 1 of 3, loss" in lines[0]
        assert capsys.readouterr().out == ""

    def test_accumulated_steps_are_the_same_steps(
        self,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Also the last one of an epoch, of a part of 4 images and one of 2.

        The gradient is clipped now and then, so that its size matters.
        """
        settings = replace(QUICK, batch_size=24, micro_batch_size=24, max_grad_norm=1.0)
        losses, weights = [], []
        for size in (24, 4):
            caplog.clear()
            with caplog.at_level(logging.INFO, "hive_vision"):
                parts = replace(settings, micro_batch_size=size)
                weights += run(encoder, data, tmp_path / str(size), parts)[1]
            losses.append([float(loss) for loss in re.findall(r"loss ([\d.]+)", caplog.text)])
        assert len(losses[0]) == 3
        assert losses[1] == pytest.approx(losses[0], abs=2e-4)
        torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3)

    def test_an_interrupted_run_goes_on(
        self, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        """To the same bytes, also where a kill left half a checkpoint."""
        expected, undisturbed = run(encoder, data, tmp_path / "a", seeds=(0, 1))
        work, images = tmp_path / "b", len(data.train)
        with pytest.raises(Interruption):
            run(encoder, interrupting(data, (3 + 2) * images - 1), work, seeds=(0, 1))
        assert [path.name for path in (work / "seed-1").iterdir()] == ["checkpoint-2"]
        (work / "seed-1" / "checkpoint-4").mkdir()
        (work / "seed-1" / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
        # What the first seed and the first epoch of the second learned is not learned again.
        outcome, weights = run(encoder, interrupting(data, 2 * images), work, seeds=(0, 1))
        np.testing.assert_array_equal(outcome.correct, expected.correct)
        assert torch.equal(*weights, undisturbed[1])

    def test_what_a_seed_found_is_kept(
        self, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        """Table 1 is days of work: another seed, set or encoder later costs nothing of it again."""
        settings = ProbeArguments(
            protocol="paper",
            paper=replace(QUICK, epochs=2, warmup_epochs=0.5),
            seeds=(0,),
            cache=str(tmp_path / "features"),
        )
        first = probe_encoder(encoder, data, settings)
        none = interrupting(data, 0)
        again = probe_encoder(encoder, none, settings)
        np.testing.assert_array_equal(again.correct, first.correct)
        for change in ({"paper": replace(settings.paper, epochs=3)}, {"seeds": (0, 1)}):
            with pytest.raises(Interruption):
                probe_encoder(encoder, none, replace(settings, **change))
        half = data.test.images.data.select(range(9))
        images = replace(data.test.images, data=half)
        fewer = LabelledImages(data.test.name, images, data.test.labels[:9])
        with pytest.raises(Interruption):
            probe_encoder(encoder, replace(none, test=fewer), settings)

    def test_more_processes(
        self, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        short = replace(QUICK, epochs=1, warmup_epochs=0.5)
        first, second = (run(encoder, data, tmp_path / name, short, workers=2)[1] for name in "ab")
        assert torch.equal(*first, *second)


class TestRefusals:
    @pytest.mark.parametrize(("epochs", "warmup"), [(1, 1.5), (1.5, 1.5)])
    def test_nothing_but_warmup(
        self,
        epochs: float,
        warmup: float,
        encoder: FrozenEncoder,
        data: ClassificationSet,
        tmp_path: Path,
    ) -> None:
        settings = replace(QUICK, epochs=epochs, warmup_epochs=warmup)
        text = message(lambda: run(encoder, data, tmp_path / "a", settings))
        assert f"paper.epochs is {epochs:g} but the warmup alone takes 1.5" in text
        assert f"paper.warmup_epochs={0.03 * epochs:g}" in text
        assert not (tmp_path / "a").exists()

    def test_images_of_any_shape(
        self, backbone_folders: dict[str, Path], data: ClassificationSet, tmp_path: Path
    ) -> None:
        naflex = FrozenEncoder.load(backbone_folders["naflex"])
        text = message(lambda: run(naflex, data, tmp_path / "a"))
        assert "images of any shape" in text
        assert "protocol=fast" in text

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_corrupt_image(
        self, workers: int, encoder: FrozenEncoder, data: ClassificationSet, tmp_path: Path
    ) -> None:
        class Corrupt(LabelledImages):
            def __getitem__(self, row: int) -> Any:
                raise ValueError(f"image {row} cannot be read")

        train = Corrupt(data.train.name, data.train.images, data.train.labels)
        corrupt = replace(data, train=train)
        text = message(lambda: run(encoder, corrupt, tmp_path / "a", workers=workers))
        assert re.fullmatch(r"image \d+ cannot be read", text)
