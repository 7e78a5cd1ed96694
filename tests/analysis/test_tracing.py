"""One trace answers for every batch and text length, and counts what is really there."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from hive_vision.analysis.tracing import Sizes, Trace, choose_sizes, trace_step
from hive_vision.models.hive import HiveForConditionalGeneration
from tests.conftest import IMAGE_SIZE, text_config, vision_config

SIZES = Sizes(1009, 61, 103)


@given(
    st.integers(1, 60),
    st.sampled_from([(1, 1, 0), (1009, 1, 1), (1009, 61, 2), (1009, 103, 3), (1009, 103**2, 4)]),
)
def test_a_size_says_how_it_grows(number: int, growth: tuple[int, int, int]) -> None:
    batch, tokens, kind = growth
    assert SIZES.split(number * batch * tokens) == (kind, number)


def test_growth_is_that_of_the_kind() -> None:
    assert SIZES.growth(1009, 61) == pytest.approx([1, 1009, 1009 * 61, 1009 * 103, 1009 * 103**2])
    assert SIZES.growth(2, 8) == pytest.approx([1, 2, 16, 100, 5000])


@pytest.mark.parametrize("image_tokens", [0, 5, 257, 576])
def test_chosen_sizes_are_no_sizes_of_the_model(image_tokens: int) -> None:
    model = nn.Linear(1009, 61 * 2, device="meta")
    sizes = choose_sizes(model, image_tokens)
    assert sizes.length == sizes.text + image_tokens
    of_the_model = 1009 * 61 * 2 * 2**20 * 3**9 * 5**9 * 7**9
    for size in (sizes.batch, sizes.text, sizes.length):
        assert of_the_model % size


def meta_model() -> HiveForConditionalGeneration:
    with torch.device("meta"):
        model = HiveForConditionalGeneration.from_backbones(
            vision_config("siglip"), text_config("llama")
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("post_layernorm" not in name and ".head." not in name)
    return model.train()


def batch(sizes: Sizes) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {
            "pixel_values": torch.zeros(sizes.batch, 3, IMAGE_SIZE, IMAGE_SIZE),
            "input_ids": torch.zeros(sizes.batch, sizes.text, dtype=torch.int64),
        }


def trace(model: PreTrainedModel, sizes: Sizes, checkpointing: bool = False) -> Trace:
    def loss(inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs, logits_to_keep=sizes.text).logits.float().square().sum()

    return trace_step(
        model, batch(sizes), loss, sizes, autocast=torch.bfloat16, checkpointing=checkpointing
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_sizes_give_the_same_as_a_trace_of_them(checkpointing: bool) -> None:
    model = meta_model()
    small, large = Sizes(11, 13, 13), Sizes(1009, 61, 61)
    one, other = (trace(model, sizes, checkpointing) for sizes in (large, small))
    for accumulates in (False, True):
        expected = other.peak(small.batch, small.text, accumulates)
        assert one.peak(small.batch, small.text, accumulates) == pytest.approx(expected, rel=0.02)
    assert one.flops_per_sample(small.text) == pytest.approx(other.flops_per_sample(small.text))


def test_gradients_are_there_from_the_start_or_come() -> None:
    model = meta_model()
    traced = trace(model, Sizes(1009, 61, 61))
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert traced.new_gradients[0] == 0
    assert traced.new_gradients[-1] == trained
    assert traced.peak(1, 8, accumulates=True)[1] == trained
    assert traced.peak(10**6, 8, accumulates=False)[1] < trained
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_but_inputs_is_left_at_the_end() -> None:
    sizes = Sizes(1009, 61, 61)
    left = trace(meta_model(), sizes).live[-1] @ sizes.growth(100, 8)
    image = 100 * 3 * IMAGE_SIZE * IMAGE_SIZE * 4
    assert image <= left < 1.02 * image


def test_checkpointing_keeps_less_and_computes_more() -> None:
    model, sizes = meta_model(), Sizes(1009, 61, 61)
    plain, checkpointed = trace(model, sizes), trace(model, sizes, checkpointing=True)
    assert checkpointed.saved_bytes(8, 16) < 0.5 * plain.saved_bytes(8, 16)
    forward = plain.flops_per_sample(16) / 3
    extra = checkpointed.flops_per_sample(16) - plain.flops_per_sample(16)
    assert 0.5 * forward < extra < forward  # projectors are in no block


def test_a_frozen_encoder_has_no_backward_pass_even_with_checkpointing() -> None:
    """Transformers lets what leaves the embeddings need gradients; that has to be undone."""
    model, sizes = meta_model(), Sizes(1009, 61, 61)
    model.vision_model.requires_grad_(False)
    plain, checkpointed = trace(model, sizes), trace(model, sizes, checkpointing=True)
    assert checkpointed.flops_per_sample(1) < 1.15 * plain.flops_per_sample(1)


class Layers(PreTrainedModel):
    """Linear layers 40 -> 30 -> 20, so that the operations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__(text_config("llama"))
        self.first = nn.Linear(40, 30, bias=False, device="meta")
        self.second = nn.Linear(30, 20, bias=False, device="meta")


@pytest.mark.parametrize(("frozen", "products"), [(False, 5), (True, 3)])
def test_operations_of_linear_layers(frozen: bool, products: int) -> None:
    """The first layer's input needs no gradient; frozen, it has no gradient of its own either."""
    model, sizes = Layers(), Sizes(1009, 61, 61)
    model.first.requires_grad_(not frozen)
    inputs = {"x": torch.zeros(sizes.batch, 40, device="meta")}
    traced = trace_step(
        model,
        inputs,
        lambda given: model.second(model.first(given["x"])).sum(),
        sizes,
        autocast=None,
        checkpointing=False,
    )
    first, second = 2 * 40 * 30, 2 * 30 * 20
    expected = {5: 2 * first + 3 * second, 3: first + 2 * second}[products]
    assert traced.flops_per_sample(8) == expected


def test_autocast_halves_what_products_keep() -> None:
    model, sizes = Layers(), Sizes(1009, 61, 61)

    def saved(autocast: torch.dtype | None) -> float:
        traced = trace_step(
            model,
            {"x": torch.zeros(sizes.batch, 40, device="meta")},
            lambda given: model.second(model.first(given["x"])).sum(),
            sizes,
            autocast=autocast,
            checkpointing=False,
        )
        return float(traced.saved[1])  # per caption

    # The input itself; then, in half precision, a copy of it and the first layer's result.
    assert saved(None) == 4 * 40 + 4 * 30
    assert saved(torch.bfloat16) == 4 * 40 + 2 * 40 + 2 * 30
