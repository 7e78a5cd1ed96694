"""The language-modelling loss: which positions, which average, which memory."""

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hive_vision.models.loss import IGNORE_INDEX, language_logits, next_token_loss
from tests.conftest import LANGUAGE_FAMILIES, VOCABULARY
from tests.models.helpers import add_noise, captions, generator

WIDTH, WORDS = 4, 7


class Head(nn.Linear):
    """An output projection that counts the rows it is asked for."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WORDS)
        self.rows: list[int] = []
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        add_noise(self, 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.numel() // WIDTH)
        return super().forward(hidden)


def states(batch: int = 3, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=generator(seed)).requires_grad_()


def some_labels(batch: int = 3, length: int = 6, seed: int = 0) -> Tensor:
    """Captions of unequal lengths after an unsupervised start token."""
    labels = torch.randint(0, WORDS, (batch, length), generator=generator(seed))
    labels[:, 0] = IGNORE_INDEX
    for row in range(batch):
        labels[row, length - row :] = IGNORE_INDEX
    return labels


def written_out(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, int]:
    """-sum log p(label_t | states up to t - 1), and the number of terms."""
    total, count = torch.zeros(()), 0
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != IGNORE_INDEX:
                logits = head(hidden[row, t - 1])
                total = total - (logits[labels[row, t]] - logits.exp().sum().log())
                count += 1
    return total, count


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, WORDS - 1), min_size=5, max_size=5), min_size=1, max_size=3),
    st.integers(1, 30),
    st.sampled_from([None, 1, 3, 100]),
)
def test_sum_over_supervised_positions(
    rows: list[list[int]], max_logits: int, divisor: int | None
) -> None:
    labels = torch.tensor(rows)
    labels[labels == -1] = IGNORE_INDEX
    hidden, head = states(len(rows), 5), Head()
    total, count = written_out(hidden, labels, head)
    loss = next_token_loss(hidden, labels, head, WORDS, divisor, max_logits)
    torch.testing.assert_close(loss, total / (divisor or max(count, 1)))


def test_label_of_the_first_position_is_never_predicted() -> None:
    hidden, head, labels = states(), Head(), some_labels()
    changed = labels.clone()
    changed[:, 0] = 3
    assert torch.equal(
        next_token_loss(hidden, labels, head, WORDS), next_token_loss(hidden, changed, head, WORDS)
    )


def test_unsupervised_positions_get_no_gradient_and_no_logits() -> None:
    hidden, head, labels = states(), Head(), some_labels()
    next_token_loss(hidden, labels, head, WORDS).backward()
    predicts = torch.zeros(3, 6, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, predicts)
    assert max(head.rows) == predicts.sum()
    assert len(head.rows) == 1, "FSDP2 loses gradients when the head is called twice"


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("count", [None, 0, 5])
def test_nothing_supervised_is_zero_with_zero_gradients(length: int, count: int | None) -> None:
    hidden = states(2, length)
    loss = next_token_loss(hidden, torch.full((2, length), IGNORE_INDEX), Head(), WORDS, count)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("max_logits", [1, WORDS, 3 * WORDS + 1, 10 * WORDS])
def test_chunks_change_neither_loss_nor_gradient(max_logits: int) -> None:
    results = []
    for limit in (2**28, max_logits):
        hidden, head = states(), Head()
        loss = next_token_loss(hidden, some_labels(), head, WORDS, max_logits=limit)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad, head.bias.grad))
        assert max(head.rows) <= max(1, limit // WORDS)
    for chunked, whole in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize("count_type", [int, torch.tensor])
def test_two_micro_batches_with_the_global_count_are_one_batch(count_type: type) -> None:
    labels = some_labels(4, 6)
    count = count_type(int((labels != IGNORE_INDEX).sum()))
    whole_states, whole_head = states(4), Head()
    whole = next_token_loss(whole_states, labels, whole_head, WORDS)
    whole.backward()
    part_states, part_head, total = states(4), Head(), torch.zeros(())
    for rows in (slice(0, 1), slice(1, 4)):  # unequal in captions and in tokens
        part = next_token_loss(part_states[rows], labels[rows], part_head, WORDS, count)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(part_states.grad, whole_states.grad)
    torch.testing.assert_close(part_head.weight.grad, whole_head.weight.grad)


def test_half_precision_states_give_a_float32_loss() -> None:
    head = Head().to(torch.bfloat16)
    hidden = states().detach().to(torch.bfloat16)
    loss = next_token_loss(hidden, some_labels(), head, WORDS)
    logits = head(hidden).float()
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), some_labels()[:, 1:].flatten()
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


# --- against the language models' own -------------------------------------------------------


@pytest.fixture(scope="module")
def language_models(backbone_folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """Noisy, so that logits are large enough for scaling and capping to show."""
    small = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    configs = {
        "cohere": transformers.CohereConfig(logit_scale=0.25, **small),
        "granite": transformers.GraniteConfig(logits_scaling=3.0, **small),
        "gemma2": transformers.Gemma2Config(
            final_logit_softcapping=7.0, head_dim=12, num_key_value_heads=2, **small
        ),
    }
    models = {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}
    for family in LANGUAGE_FAMILIES:
        models[family] = AutoModelForCausalLM.from_pretrained(backbone_folders[family])
    for model in models.values():
        add_noise(model.eval(), 0.2)
    return models


FAMILIES = [*LANGUAGE_FAMILIES, "cohere", "granite", "gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_models_own(
    family: str, language_models: dict[str, PreTrainedModel]
) -> None:
    model = language_models[family]
    hidden = model.base_model(captions(2, 6)).last_hidden_state
    head = model.get_output_embeddings()
    logits = language_logits(hidden, head, model.config)
    torch.testing.assert_close(logits, model(captions(2, 6)).logits)
    special = family in ("gemma3", "gemma2", "cohere", "granite")
    assert torch.allclose(logits, head(hidden)) != special


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [None, 17])
@torch.no_grad()
def test_loss_is_the_models_own(
    family: str, count: int | None, language_models: dict[str, PreTrainedModel]
) -> None:
    model, ids = language_models[family], captions(2, 6)
    hidden = model.base_model(ids).last_hidden_state

    def head(states: Tensor) -> Tensor:
        return language_logits(states, model.get_output_embeddings(), model.config)

    padded = ids.clone()
    padded[:, 0] = padded[1, 4:] = IGNORE_INDEX
    counted = {} if count is None else {"num_items_in_batch": count}
    for labels in (ids, padded):
        expected = model(ids, labels=labels, **counted).loss
        torch.testing.assert_close(
            next_token_loss(hidden, labels, head, VOCABULARY, count), expected
        )
