"""What a batch holds and which tokens of it are supervised."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Siglip2ImageProcessor, SiglipImageProcessor

from hive_vision.data.captions import Caption
from hive_vision.data.collators import (
    IGNORE_INDEX,
    CaptionCollator,
    InstructionCollator,
    trim_patches,
)
from hive_vision.data.instructions import Instruction
from hive_vision.data.replacement import BadSample

START, END, PAD, IMAGE = 1, 2, 0, 99
X = IGNORE_INDEX
COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def image_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 8, "width": 8})


def sample(caption: list[int], sample_id: int = 0, bad: list[BadSample] | None = None) -> Caption:
    return Caption(
        image=Image.new("RGB", (12, 10), COLOURS[sample_id % 3]),
        input_ids=[START, *caption, END],
        sample_id=sample_id,
        bad_samples=bad or [],
    )


def supervised(batch: dict) -> list[list[int]]:
    return [row[row != IGNORE_INDEX].tolist() for row in batch["labels"]]


def test_the_example_of_the_docstring(image_processor: SiglipImageProcessor) -> None:
    batch = CaptionCollator(image_processor, PAD)([sample([5, 6]), sample([7])])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [1, 7, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[X, 5, 6, 2], [X, 7, 2, X]]
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].dtype == torch.int64


def test_placeholders_of_sa(image_processor: SiglipImageProcessor) -> None:
    collate = CaptionCollator(image_processor, PAD, image_tokens=(IMAGE,) * 3)
    batch = collate([sample([5, 6]), sample([7])])
    assert batch["input_ids"].tolist() == [[1, 99, 99, 99, 5, 6, 2], [1, 99, 99, 99, 7, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    assert batch["labels"].tolist() == [[X, X, X, X, 5, 6, 2], [X, X, X, X, 7, 2, X]]


@pytest.mark.parametrize("image_tokens", [(), (IMAGE,) * 4])
@pytest.mark.parametrize("pad", [PAD, END, START, 5])
def test_the_padding_token_never_decides(
    image_processor: SiglipImageProcessor, pad: int, image_tokens: tuple[int, ...]
) -> None:
    # Many tokenizers pad with the end token: the end must be learnt all the same, once.
    batch = CaptionCollator(image_processor, pad, image_tokens)([sample([5, 6, 5]), sample([7])])
    assert supervised(batch) == [[5, 6, 5, END], [7, END]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        5 + len(image_tokens),
        3 + len(image_tokens),
    ]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == pad).all()


def test_start_token_that_is_also_the_end(image_processor: SiglipImageProcessor) -> None:
    # Tokenizers without a start token begin with the end token (GPT-NeoX, Qwen).
    caption = sample([5, 6])
    caption["input_ids"][0] = END
    assert supervised(CaptionCollator(image_processor, END)([caption])) == [[5, 6, END]]


def test_labels_are_the_input_or_ignored(image_processor: SiglipImageProcessor) -> None:
    batch = CaptionCollator(image_processor, PAD, (IMAGE,))([sample([5]), sample([6, 7, 8])])
    chosen = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][chosen], batch["input_ids"][chosen])
    assert not chosen[:, 0].any()


def test_hive_and_sa_learn_from_the_same_tokens(image_processor: SiglipImageProcessor) -> None:
    samples = [sample([5, 6, 7], 0), sample([8], 1), sample([9, 9], 2)]
    hive = CaptionCollator(image_processor, PAD)(samples)
    sa = CaptionCollator(image_processor, PAD, (IMAGE,) * 16)(samples)
    assert supervised(hive) == supervised(sa) == [[5, 6, 7, END], [8, END], [9, 9, END]]
    assert torch.equal(hive["pixel_values"], sa["pixel_values"])
    assert sa["input_ids"].shape[1] == hive["input_ids"].shape[1] + 16


def test_images_are_those_of_the_samples(image_processor: SiglipImageProcessor) -> None:
    samples = [sample([5], 0), sample([6, 7], 1), sample([8], 2)]
    batch = CaptionCollator(image_processor, PAD)(samples)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    for row, one in zip(batch["pixel_values"], samples, strict=True):
        alone = image_processor([one["image"]], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(row, alone)


class TestSharedImages:
    def grouped(self, *numbers: int) -> list[Caption]:
        """Samples of which those with the same number have one image together."""
        shared = {number: sample([5], number)["image"] for number in numbers}
        return [{**sample([5 + place]), "image": shared[n]} for place, n in enumerate(numbers)]

    @pytest.mark.parametrize("image_tokens", [(), (IMAGE,) * 4])
    def test_are_stacked_once(
        self, image_processor: SiglipImageProcessor, image_tokens: tuple[int, ...]
    ) -> None:
        collate = CaptionCollator(image_processor, PAD, image_tokens)
        samples = self.grouped(0, 0, 1, 2, 2, 0)
        batch = collate(samples)
        assert batch["image_index"].tolist() == [0, 0, 1, 2, 2, 0]
        assert batch["image_index"].dtype == torch.int64
        assert batch["pixel_values"].shape == (3, 3, 8, 8)
        copies = collate([{**one, "image": one["image"].copy()} for one in samples])
        assert "image_index" not in copies
        assert torch.equal(batch["pixel_values"][batch["image_index"]], copies["pixel_values"])
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[name], copies[name])

    def test_nothing_changes_where_none_is_shared(
        self, image_processor: SiglipImageProcessor
    ) -> None:
        batch = CaptionCollator(image_processor, PAD)(self.grouped(0, 1, 2))
        assert "image_index" not in batch
        assert len(batch["pixel_values"]) == 3

    def test_of_any_shape(self) -> None:
        processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=30)
        batch = CaptionCollator(processor, PAD)(self.grouped(0, 0, 1))
        assert batch["image_index"].tolist() == [0, 0, 1]
        shapes = [batch[name].shape[0] for name in ("spatial_shapes", "pixel_attention_mask")]
        assert [*shapes, batch["pixel_values"].shape[0]] == [2, 2, 2]


def test_padding_of_patches_ends_with_the_batchs_longest() -> None:
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=30)
    wide, square = sample([5]), sample([6, 7], 1)
    square["image"] = Image.new("RGB", (10, 10), "red")
    wide["image"] = Image.new("RGB", (8, 20), "blue")
    collate = CaptionCollator(processor, PAD)
    both, one = collate([wide, square]), collate([square])
    assert both["spatial_shapes"].tolist() == [[8, 3], [5, 5]]
    assert both["pixel_attention_mask"].sum(dim=1).tolist() == [24, 25]
    assert both["pixel_values"].shape == (2, 25, 3 * 4 * 4)
    assert one["pixel_attention_mask"].shape == (1, 25)
    whole = processor([wide["image"], square["image"]], return_tensors="pt")
    assert torch.equal(both["pixel_values"], whole["pixel_values"][:, :25])
    assert not whole["pixel_attention_mask"][:, 25:].any()
    assert both["labels"].shape == (2, 4)


def test_two_patches_are_not_taken_for_two_numbers() -> None:
    """Shapes (B, 2) stay whole where a mask is as wide as they are."""
    images = {
        "pixel_values": torch.ones(2, 2, 12),
        "pixel_attention_mask": torch.tensor([[1, 0], [1, 0]]),
        "spatial_shapes": torch.tensor([[1, 1], [1, 1]]),
    }
    trimmed = trim_patches(images)
    assert trimmed["spatial_shapes"].shape == (2, 2)
    assert trimmed["pixel_values"].shape == (2, 1, 12)


def test_sample_ids_and_bad_samples(image_processor: SiglipImageProcessor) -> None:
    bad = [BadSample(3, "3.png", "empty caption", 1), BadSample(4, "4.png", "empty caption", 1)]
    batch = CaptionCollator(image_processor, PAD)([sample([5], 0), sample([6], 1, bad)])
    assert batch["sample_ids"] == [0, 1]
    assert batch["bad_samples"] == bad


def test_a_collator_fits_into_a_worker_process(image_processor: SiglipImageProcessor) -> None:
    loader = torch.utils.data.DataLoader(
        [sample([5, 6]), sample([7], 1)],
        batch_size=2,
        num_workers=1,
        collate_fn=CaptionCollator(image_processor, PAD),
    )
    (batch,) = loader
    assert supervised(batch) == [[5, 6, END], [7, END]]


def instruction(images: int, ids: list[int], *learned: tuple[int, int], number: int = 0) -> Any:
    return Instruction(
        images=[Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(1, images + 1)],
        input_ids=ids,
        learned=list(learned),
        sample_id=number,
        bad_samples=[],
    )


def shades(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
    values = [image.getpixel((0, 0))[0] for image in images]
    return {"pixel_values": torch.tensor(values)[:, None, None, None]}


class TestInstructions:
    collator = InstructionCollator(shades, pad_token_id=0, image_token_id=9, image_tokens=3)

    def test_images_take_their_places(self) -> None:
        batch = self.collator(
            [
                instruction(2, [1, 9, 5, 9, 6, 7, 2], (2, 3), (5, 7), number=4),
                instruction(0, [1, 5, 7, 2], (2, 4), number=8),
            ]
        )
        none = IGNORE_INDEX
        assert batch["input_ids"].tolist() == [
            [1, 9, 9, 9, 5, 9, 9, 9, 6, 7, 2],
            [1, 5, 7, 2, *[0] * 7],
        ]
        assert batch["labels"].tolist() == [
            [none] * 4 + [5] + [none] * 4 + [7, 2],
            [none, none, 7, 2, *[none] * 7],
        ]
        assert batch["attention_mask"].tolist() == [[1] * 11, [1] * 4 + [0] * 7]
        assert batch["pixel_values"].flatten().tolist() == [1, 2]
        assert batch["sample_ids"] == [4, 8]

    def test_a_batch_of_text_has_an_image_that_nobody_sees(self) -> None:
        """Behind everything, so that the connector is part of every step."""
        batch = self.collator([instruction(0, [1, 5, 2], (1, 3)), instruction(0, [1, 5], (1, 2))])
        assert batch["input_ids"].tolist() == [[1, 5, 2, 9, 9, 9], [1, 5, 0, 0, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
        assert batch["labels"][:, 3:].eq(IGNORE_INDEX).all()
        assert len(batch["pixel_values"]) == 1


def test_features_are_stacked_and_shared_ones_once(image_processor):
    one, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    samples = [{**sample([5]), "image": image} for image in (one, other, one)]
    batch = CaptionCollator(image_processor, PAD)(samples)
    assert torch.equal(batch["encoder_features"], torch.stack([one, other]))
    assert batch["image_index"].tolist() == [0, 1, 0]
    assert "pixel_values" not in batch
