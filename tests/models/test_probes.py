"""Heads on frozen features against the same written with plain tensor operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hive_vision.models.probes import AttentiveProbe, LinearProbe, masked_mean

WIDTH, CLASSES, HEADS = 12, 5, 3


@pytest.fixture
def tokens() -> Tensor:
    """4 images of 7 tokens, far from normalised."""
    generator = torch.Generator().manual_seed(1)
    return 3 + 5 * torch.randn(4, 7, WIDTH, generator=generator)


@pytest.fixture
def mask() -> Tensor:
    """Each image has another number of tokens, from all to one."""
    return torch.arange(7) < torch.tensor([[7], [5], [2], [1]])


def shaken(head: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value that is not that of its start (biases 0, norm 1)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return head


def normalised(tokens: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def attended(head: AttentiveProbe, tokens: Tensor, count: int) -> Tensor:
    """What one image (N, D) gives: attention by hand to its first ``count`` tokens."""
    tokens = normalised(tokens[:count], head.norm)
    query_weight, key_weight, value_weight = head.attention.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = head.attention.in_proj_bias.chunk(3)
    query = query_weight @ head.query[0, 0] + query_bias
    keys = tokens @ key_weight.T + key_bias
    values = tokens @ value_weight.T + value_bias
    size = WIDTH // HEADS
    pooled = []
    for start in range(0, WIDTH, size):
        part = slice(start, start + size)
        scores = torch.exp(keys[:, part] @ query[part] / math.sqrt(size))
        pooled.append((scores / scores.sum()) @ values[:, part])
    out = head.attention.out_proj
    mixed = out.weight @ torch.cat(pooled) + out.bias
    return head.classifier.weight @ mixed + head.classifier.bias


class TestLinear:
    def test_norm_mean_classifier(self, tokens: Tensor, mask: Tensor) -> None:
        head = shaken(LinearProbe(WIDTH, CLASSES))
        normed = normalised(tokens, head.norm)
        for given_mask in (None, mask):
            counts = [7] * 4 if given_mask is None else mask.sum(dim=1).tolist()
            pooled = torch.stack(
                [row[:n].mean(dim=0) for row, n in zip(normed, counts, strict=True)]
            )
            expected = pooled @ head.classifier.weight.T + head.classifier.bias
            torch.testing.assert_close(head(tokens, given_mask), expected)

    def test_cls_is_the_first_token(self, tokens: Tensor) -> None:
        head = shaken(LinearProbe(WIDTH, CLASSES, pooling="cls"))
        pooled = normalised(tokens, head.norm)[:, 0]
        expected = pooled @ head.classifier.weight.T + head.classifier.bias
        torch.testing.assert_close(head(tokens), expected)
        other = tokens.clone()
        other[:, 1:] = 0
        torch.testing.assert_close(head(other), expected)

    def test_one_vector_is_one_token(self, tokens: Tensor) -> None:
        """The encoder's own pooling head gives (B, D), which a caller makes (B, 1, D)."""
        head = shaken(LinearProbe(WIDTH, CLASSES))
        expected = head.classifier(head.norm(tokens[:, 3]))
        torch.testing.assert_close(head(tokens[:, 3:4]), expected)


class TestAttentive:
    def test_attention_by_hand(self, tokens: Tensor) -> None:
        head = shaken(AttentiveProbe(WIDTH, CLASSES, HEADS))
        expected = torch.stack([attended(head, image, 7) for image in tokens])
        torch.testing.assert_close(head(tokens), expected, rtol=1e-4, atol=1e-5)

    def test_padding_is_not_attended(self, tokens: Tensor, mask: Tensor) -> None:
        head = shaken(AttentiveProbe(WIDTH, CLASSES, HEADS))
        counts = mask.sum(dim=1).tolist()
        expected = torch.stack(
            [attended(head, image, n) for image, n in zip(tokens, counts, strict=True)]
        )
        torch.testing.assert_close(head(tokens, mask), expected, rtol=1e-4, atol=1e-5)
        padding = torch.where(mask[..., None], tokens, 1e3)
        torch.testing.assert_close(head(padding, mask), expected, rtol=1e-4, atol=1e-5)

    def test_the_order_of_tokens_does_not_matter(self, tokens: Tensor) -> None:
        head = shaken(AttentiveProbe(WIDTH, CLASSES, HEADS))
        torch.testing.assert_close(head(tokens), head(tokens.flip(1)))

    def test_every_parameter_learns(self, tokens: Tensor) -> None:
        head = shaken(AttentiveProbe(WIDTH, CLASSES, HEADS))
        head(tokens).square().sum().backward()
        # A shift of all keys changes no weight of the attention, so their bias has no gradient.
        gradients = {name: p.grad.clone() for name, p in head.named_parameters()}
        gradients["attention.in_proj_bias"][WIDTH : 2 * WIDTH] = 1
        assert all((gradient != 0).any() for gradient in gradients.values())

    def test_start(self) -> None:
        """Xavier for query and projections, LeCun for the output, zero for the biases."""
        width = 96
        torch.manual_seed(0)
        head = AttentiveProbe(width, 10, 8)
        bounds = {  # sqrt(6 / (in + out)), of the query as torch counts them
            head.query: math.sqrt(6 / (width + width)),
            head.attention.in_proj_weight: math.sqrt(6 / (width + 3 * width)),
        }
        assert head.query.shape == (1, 1, width)
        for parameter, bound in bounds.items():
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.9 * bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        out = head.attention.out_proj.weight
        assert out.std().item() == pytest.approx(1 / math.sqrt(width), rel=0.03)
        assert out.abs().max() <= 2 / math.sqrt(width) / 0.8796
        assert out.abs().max() > 1.9 / math.sqrt(width) / 0.8796, "cut at two deviations"
        assert not head.attention.in_proj_bias.any()
        assert not head.attention.out_proj.bias.any()
        assert (head.norm.weight == 1).all()
        assert not head.norm.bias.any()


@pytest.mark.parametrize("make", [lambda: LinearProbe(8, 3), lambda: AttentiveProbe(8, 3, 2)])
def test_the_seed_makes_the_weights(make: type[torch.nn.Module]) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(make().parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


class TestMaskedMean:
    @settings(max_examples=30, deadline=None)
    @given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
    def test_is_the_mean_of_what_is_no_padding(self, counts: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(len(counts), 6, 3, generator=generator)
        mask = torch.zeros(len(counts), 6, dtype=torch.bool)
        for row, count in enumerate(counts):
            mask[row, torch.randperm(6, generator=generator)[:count]] = True
        expected = torch.stack([tokens[row][mask[row]].mean(dim=0) for row in range(len(counts))])
        torch.testing.assert_close(masked_mean(tokens, mask), expected)

    def test_without_a_mask(self, tokens: Tensor) -> None:
        torch.testing.assert_close(masked_mean(tokens, None), tokens.sum(dim=1) / 7)
        every = torch.ones(4, 7, dtype=torch.bool)
        torch.testing.assert_close(masked_mean(tokens, None), masked_mean(tokens, every))

    def test_keeps_the_precision(self, tokens: Tensor, mask: Tensor) -> None:
        assert masked_mean(tokens.double(), mask).dtype == torch.float64
