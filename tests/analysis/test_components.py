"""Operations are counted for the component that they belong to, forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hive_vision.analysis.components import (
    COMPONENTS,
    CROSS_ATTENTION,
    HEAD,
    KEYS_AND_VALUES,
    LANGUAGE,
    OTHER,
    PROJECTORS,
    VISION,
    ComponentTracker,
    Place,
    components_of,
)
from hive_vision.models.backbones import load_language_model
from tests.analysis.test_cost_model import TOKENS, build, cost_of, make_batch
from tests.analysis.test_cost_model import VISION as ENCODER
from tests.conftest import text_config

PATCHES = (ENCODER.image_size // ENCODER.patch_size) ** 2


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", ["hive", "sa"])
def test_all_products_of_a_real_step_are_in_some_component(method: str, stage: int) -> None:
    """Against torch's counter, which knows nothing of components, meta device or growth."""
    model, image_tokens = build(method, stage, "cpu")
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**make_batch(4, image_tokens), return_logits=False).loss.backward()
    found = cost_of(method, stage).plain.flops_by_place(TOKENS)
    assert {place.component for place in found} <= set(COMPONENTS)
    # Of the last position, and of the shorter caption's last two, no logits are computed.
    fewer = found[Place(HEAD, False)] + found[Place(HEAD, True)]
    fewer *= 5 / (4 * TOKENS)
    assert counter.get_total_flops() / 4 == pytest.approx(sum(found.values()) - fewer, rel=0.02)


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_components_alone_need_what_is_counted_for_them(method: str) -> None:
    model, _ = build(method, 3, "cpu")
    found = cost_of(method, 3).plain.flops_by_place(TOKENS)
    components = components_of(model)
    inputs = {
        VISION: torch.zeros(1, 3, ENCODER.image_size, ENCODER.image_size),
        PROJECTORS: torch.zeros(1, PATCHES, ENCODER.hidden_size),
        KEYS_AND_VALUES: torch.zeros(1, PATCHES, 64),
        HEAD: torch.zeros(1, TOKENS, 64),
    }
    for name, value in inputs.items():
        if name not in components:
            continue
        with FlopCounterMode(display=False) as counter:
            for module in components[name]:
                module(value)
        assert found[Place(name, False)] == counter.get_total_flops(), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_backward_needs_twice_the_forward_where_all_is_trained(stage: int) -> None:
    found = cost_of("hive", stage).plain.flops_by_place(TOKENS)
    assert (Place(VISION, True) in found) == (stage == 3)
    # A projector's norm is trained, so a gradient comes there even before a frozen encoder.
    names = (PROJECTORS, KEYS_AND_VALUES, *((HEAD,) if stage > 1 else ()))
    for name in names:
        assert found[Place(name, True)] == 2 * found[Place(name, False)], name
    share = found[Place(LANGUAGE, True)] / found[Place(LANGUAGE, False)]
    assert share < 1.5 if stage == 1 else 1.9 < share < 2.2  # attention recomputes its weights


def test_recomputation_is_the_same_component_s_backward() -> None:
    cost = cost_of("hive", 3)
    assert cost.checkpointed is not None
    plain, again = (t.flops_by_place(TOKENS) for t in (cost.plain, cost.checkpointed))
    for name in (VISION, LANGUAGE, CROSS_ATTENTION, KEYS_AND_VALUES):
        extra = again[Place(name, True)] - plain[Place(name, True)]
        # The last product of a block is not recomputed: nothing in the block needs it.
        assert 0.6 < extra / plain[Place(name, False)] <= 1, name
        assert again[Place(name, False)] == plain[Place(name, False)]
    assert again[Place(PROJECTORS, True)] == plain[Place(PROJECTORS, True)]


def test_a_tracker_leaves_nothing_behind() -> None:
    model, _ = build("hive", 1, "cpu")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with ComponentTracker(components_of(model)) as tracker:
        assert tracker.place == Place(OTHER, False)
        with pytest.raises(RuntimeError):  # also a module that fails has been left
            model.get_output_embeddings()(torch.zeros(1, 3))
        assert tracker.place == Place(OTHER, False)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*give hive, cascaded or sa"):
        components_of(load_language_model(text_config("llama")))
