"""Zero-shot classification and retrieval against plain transformers calls, one pair at a time."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from hive_vision.data.classification import LabelledImages
from hive_vision.data.images import ColumnImages
from hive_vision.data.sources import CaptionSource
from hive_vision.evaluation import zero_shot
from hive_vision.evaluation.statistics import accuracy
from hive_vision.evaluation.zero_shot import (
    DualEncoder,
    classify_zero_shot,
    embed_classes,
    retrieve,
)
from tests.conftest import WORDS, vision_config
from tests.data.helpers import encoded, in_memory, one_line
from tests.models.dual_encoders import FAMILIES, MAX_TOKENS, write_dual_encoder

NAMES = ("red_circle", "Green star", "blue{}", "a", "two_small_cats", "square and star", "left")
IMAGES = 23


@pytest.fixture(scope="module")
def duals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dual encoders whose images vary: from random weights all images look much the same."""
    root = tmp_path_factory.mktemp("duals")
    for family in FAMILIES:
        model = write_dual_encoder(family, root / family)
        state = model.state_dict()
        patches = next(n for n in state if "patch_embedding" in n and n.endswith(".weight"))
        state[patches] *= 10
        model.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def encoders(duals: dict[str, Path]) -> dict[str, DualEncoder]:
    return {family: DualEncoder.load(folder) for family, folder in duals.items()}


def pixels(row: int) -> Image.Image:
    """One colour with some noise, not square."""
    random = np.random.default_rng(row)
    colour = random.integers(0, 256, 3)
    noise = random.normal(0, 30, (40, 32, 3))
    return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))


def stored(rows: Sequence[int]) -> list[dict]:
    return [{"bytes": encoded(pixels(row)), "path": None} for row in rows]


def labelled(labels: Sequence[int], contents: list[dict] | None = None) -> LabelledImages:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = stored(range(len(labels))) if contents is None else contents
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    return LabelledImages("colours", ColumnImages(data, "image", ""), np.array(labels))


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    return labelled([row % len(NAMES) for row in range(IMAGES)])


class Reference:
    """The model as its documentation uses it, with one text and one image at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModel.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, text: str, row: int, padding: str = "max_length") -> tuple[Tensor, Tensor]:
        """Embeddings of a text and an image, of length 1."""
        tokens = self.processor.tokenizer(
            [text], padding=padding, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        images = self.processor.image_processor(pixels(row), return_tensors="pt")
        output = self.model(**tokens, **images)
        return output.text_embeds[0], output.image_embeds[0]

    def text(self, text: str, padding: str = "max_length") -> Tensor:
        return self(text, 0, padding)[0]

    def scores(self, texts: Sequence[str], rows: Sequence[int]) -> NDArray[np.float64]:
        """Cosines (N, P)."""
        embedded = torch.stack([self.text(text) for text in texts])
        images = torch.stack([self("a", row)[1] for row in rows])
        return (images @ embedded.T).double().numpy()


@pytest.fixture(scope="module")
def references(duals: dict[str, Path]) -> dict[str, Reference]:
    return {family: Reference(folder) for family, folder in duals.items()}


@pytest.mark.parametrize("family", FAMILIES)
class TestClassification:
    def test_equals_one_pair_at_a_time(
        self,
        family: str,
        encoders: dict[str, DualEncoder],
        references: dict[str, Reference],
        images: LabelledImages,
    ) -> None:
        texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
        answers = references[family].scores(texts, range(IMAGES)).argmax(axis=1)
        assert len(set(answers)) > 2, "or there is nothing to compare"
        correct = classify_zero_shot(encoders[family], images, NAMES, batch_size=5)
        assert (correct.shape, correct.dtype) == ((1, IMAGES), bool)
        assert correct[0].tolist() == (answers == images.labels).tolist()
        # Right answers for labels that are the answers.
        right = classify_zero_shot(encoders[family], labelled(answers.tolist()), NAMES)
        assert right.all()
        assert accuracy(right).mean == 1

    def test_several_templates_are_averaged_at_length_one(
        self, family: str, encoders: dict[str, DualEncoder], references: dict[str, Reference]
    ) -> None:
        templates = ("a photo of a {}.", "{} and {}", "small {}")
        embedded = embed_classes(encoders[family], NAMES[:3], templates)
        for name, found in zip(("red circle", "Green star", "blue{}"), embedded, strict=True):
            texts = [f"a photo of a {name}.", f"{name} and {name}", f"small {name}"]
            parts = [references[family].text(text) for text in texts]
            parts = [part / part.norm() for part in parts]
            mean = torch.stack(parts).mean(dim=0)
            torch.testing.assert_close(found, mean / mean.norm(), atol=1e-5, rtol=1e-4)

    def test_templates_decide(
        self, family: str, encoders: dict[str, DualEncoder], references: dict[str, Reference]
    ) -> None:
        """Answers under one template are not those under another."""
        answers = references[family].scores([f"star {name}" for name in "abc"], range(IMAGES))
        images = labelled(answers.argmax(axis=1).tolist())
        assert classify_zero_shot(encoders[family], images, tuple("abc"), ("star {}",)).all()
        assert not classify_zero_shot(encoders[family], images, tuple("abc")).all()

    def test_workers_and_batches_change_nothing(
        self, family: str, encoders: dict[str, DualEncoder], images: LabelledImages
    ) -> None:
        whole = classify_zero_shot(encoders[family], images, NAMES)
        parts = classify_zero_shot(encoders[family], images, NAMES, batch_size=4, workers=2)
        assert whole.tolist() == parts.tolist()


class TestPadding:
    """Everything is padded to the full length, which is right for both kinds of training."""

    def test_a_mask_makes_padding_invisible(
        self, encoders: dict[str, DualEncoder], references: dict[str, Reference]
    ) -> None:
        for text in ("a", "two small red stars"):
            (found,) = encoders["clip"].embed_texts([text])
            shortest = references["clip"].text(text, padding="longest")
            torch.testing.assert_close(found, shortest, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("family", ["siglip", "siglip2"])
    def test_without_a_mask_padding_is_read(
        self, family: str, encoders: dict[str, DualEncoder], references: dict[str, Reference]
    ) -> None:
        (found,) = encoders[family].embed_texts(["a"])
        torch.testing.assert_close(found, references[family].text("a"), atol=1e-5, rtol=1e-4)
        shortest = references[family].text("a", padding="longest")
        assert (found - shortest).abs().max() > 0.01

    @pytest.mark.parametrize("family", FAMILIES)
    def test_length_is_known_and_long_texts_are_cut(
        self, family: str, encoders: dict[str, DualEncoder]
    ) -> None:
        encoder = encoders[family]
        assert encoder.max_tokens == MAX_TOKENS
        long, longer = encoder.embed_texts([" ".join(["star"] * count) for count in (60, 70)])
        assert torch.equal(long, longer)

    def test_texts_in_batches(self, encoders: dict[str, DualEncoder]) -> None:
        whole = encoders["siglip"].embed_texts(NAMES)
        torch.testing.assert_close(encoders["siglip"].embed_texts(NAMES, batch_size=2), whole)


CAPTIONS = [
    ["a red circle", "two stars"],
    ["green"],
    ["a small blue square", "left", "three stars", "a"],
    ["large circle and star"],
    ["blue"],
    # Words of the tiny tokenizers: two texts of unknown words would be the same.
    *([f"{first} {second}"] for first in ("star", "circle", "left") for second in WORDS[1:5]),
]


def captioned() -> CaptionSource:
    return in_memory(stored(range(len(CAPTIONS))), CAPTIONS)


def recalled(scores: NDArray[np.float64], k: int) -> tuple[list[bool], list[bool]]:
    """By sorting scores (N, P)."""
    owners = np.repeat(np.arange(len(CAPTIONS)), [len(texts) for texts in CAPTIONS])
    texts = np.argsort(-scores, axis=1)[:, :k]
    images = np.argsort(-scores.T, axis=1)[:, :k]
    return (
        [bool(row in owners[found]) for row, found in enumerate(texts)],
        [bool(owner in found) for owner, found in zip(owners, images, strict=True)],
    )


@pytest.mark.parametrize("family", FAMILIES)
class TestRetrieval:
    def test_equals_sorting_one_pair_at_a_time(
        self, family: str, encoders: dict[str, DualEncoder], references: dict[str, Reference]
    ) -> None:
        flat = [text for texts in CAPTIONS for text in texts]
        scores = references[family].scores(flat, range(len(CAPTIONS)))
        result = retrieve(encoders[family], captioned(), batch_size=5)
        for k in (1, 5, 10):
            of_images, of_texts = recalled(scores, k)
            assert result.image_to_text[k].tolist() == [of_images]
            assert result.text_to_image[k].tolist() == [of_texts]
        means = [result.text_to_image[k].mean() for k in (1, 5, 10)]
        assert 0 < means[1] < 1, "or there is nothing to compare"
        assert means == sorted(means)
        assert accuracy(result.image_to_text[5]).images == len(CAPTIONS)

    @pytest.mark.parametrize("at_once", [1, 60])
    def test_parts_and_workers_change_nothing(
        self,
        family: str,
        at_once: int,
        encoders: dict[str, DualEncoder],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        whole = retrieve(encoders[family], captioned())
        monkeypatch.setattr(zero_shot, "SCORES_AT_ONCE", at_once)
        parts = retrieve(encoders[family], captioned(), batch_size=3, workers=2)
        for k in (1, 5, 10):
            assert parts.image_to_text[k].tolist() == whole.image_to_text[k].tolist()
            assert parts.text_to_image[k].tolist() == whole.text_to_image[k].tolist()


def test_any_caption_of_the_image_counts(encoders: dict[str, DualEncoder]) -> None:
    """An image's recall with several captions is that of its best one."""
    pair = in_memory(stored(range(3)), [["star", "left"], ["circle"], ["two"]])
    singles = [
        in_memory(stored(range(3)), [[text], ["circle"], ["two"]]) for text in ("star", "left")
    ]
    both = retrieve(encoders["clip"], pair).image_to_text[1][0, 0]
    either = [retrieve(encoders["clip"], single).image_to_text[1][0, 0] for single in singles]
    assert both == any(either)


def test_an_encoder_that_sees_no_difference_gets_chance(duals: dict[str, Path]) -> None:
    encoder = DualEncoder.load(duals["siglip"])
    state = encoder.model.vision_model.state_dict()
    for name in ("head.mlp.fc2.weight", "head.attention.out_proj.weight"):
        state[name].zero_()
    rows = [0, *range(2, 20), 0]
    result = retrieve(encoder, in_memory(stored(rows), [[f"word {row}"] for row in range(20)]))
    for k in (1, 5, 10):
        # About k of 20; rounding may break ties otherwise than the order does.
        assert result.text_to_image[k].sum() <= k + 5


def test_what_has_no_caption_takes_no_part(encoders: dict[str, DualEncoder]) -> None:
    words = ["star", "left", "circle", "two", "green"]
    plain = in_memory(stored(range(5)), [[word] for word in words])
    holes = in_memory(
        stored([0, 90, 1, 2, 91, 3, 4]),
        [["star"], [], ["", "left"], ["circle", None], [" "], ["two"], ["green"]],
    )
    expected, found = (retrieve(encoders["clip"], source) for source in (plain, holes))
    for k in (1, 5, 10):
        assert found.image_to_text[k].tolist() == expected.image_to_text[k].tolist()
        assert found.text_to_image[k].tolist() == expected.text_to_image[k].tolist()
    with pytest.raises(ValueError, match="no captions to search for"):
        retrieve(encoders["clip"], in_memory(stored([0, 1]), [[], [None]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family: str, duals: dict[str, Path]) -> None:
    encoder = DualEncoder.load(duals[family], precision="bfloat16")
    exact = DualEncoder.load(duals[family]).embed_texts(NAMES)
    embedded = encoder.embed_texts(NAMES)
    assert embedded.dtype == torch.float32
    assert not torch.equal(embedded, exact)
    assert (embedded * exact).sum(dim=1).min() > 0.99
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(NAMES)))


class TestMistakes:
    def test_a_set_without_class_names(
        self, encoders: dict[str, DualEncoder], images: LabelledImages
    ) -> None:
        with pytest.raises(ValueError, match="no class names") as failure:
            classify_zero_shot(encoders["clip"], images, ())
        assert "ClassLabel" in one_line(failure)

    def test_too_few_class_names(
        self, encoders: dict[str, DualEncoder], images: LabelledImages
    ) -> None:
        with pytest.raises(ValueError, match="images of class 6 but 3 class names") as failure:
            classify_zero_shot(encoders["clip"], images, NAMES[:3])
        one_line(failure)

    @pytest.mark.parametrize(
        ("templates", "words"), [((), "no templates"), (("a photo",), "'a photo' has no place")]
    )
    def test_templates(
        self, templates: tuple[str, ...], words: str, encoders: dict[str, DualEncoder]
    ) -> None:
        with pytest.raises(ValueError, match=words) as failure:
            embed_classes(encoders["clip"], NAMES, templates)
        assert "{}" in one_line(failure)

    def test_an_image_that_cannot_be_read(self, encoders: dict[str, DualEncoder]) -> None:
        contents = [*stored([0, 1]), {"bytes": b"no image", "path": None}]
        with pytest.raises(ValueError, match=r"image 2 .*colours cannot be read") as failure:
            classify_zero_shot(encoders["clip"], labelled([0, 1, 2], contents), NAMES, batch_size=2)
        one_line(failure)
        with pytest.raises(ValueError, match="image row 2 of memory cannot be read") as failure:
            retrieve(encoders["clip"], in_memory(contents, ["a", "b", "c"]))
        one_line(failure)

    def test_a_plain_encoder(self, tmp_path: Path) -> None:
        AutoModel.from_config(vision_config("siglip", layers=1)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is no dual encoder") as failure:
            DualEncoder.load(tmp_path)
        assert "CLIP or SigLIP" in one_line(failure)

    def test_no_processor(self, duals: dict[str, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(duals["clip"], tmp_path / "full")
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match="no whole processor") as failure:
            DualEncoder.load(folder)
        one_line(failure)

    def test_weights_that_are_not_finite(
        self, duals: dict[str, Path], images: LabelledImages
    ) -> None:
        encoder = DualEncoder.load(duals["clip"])
        encoder.model.visual_projection.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite") as failure:
            classify_zero_shot(encoder, images, NAMES)
        one_line(failure)

    def test_a_tokenizer_that_cannot_pad(self, duals: dict[str, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(duals["clip"], tmp_path / "full")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = json.loads((folder / name).read_text()) | {"pad_token": None}
            (folder / name).write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="no padding token") as failure:
            DualEncoder.load(folder)
        one_line(failure)
