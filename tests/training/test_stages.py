import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from hive_vision.models.backbones import backbones_of, blank_images, hash_tensors
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.training.hardware import prepare_model
from hive_vision.training.stages import (
    GROUPS,
    apply_rules,
    check_gradient_path,
    describe_parts,
    parameter_groups,
    prove_update,
    spare_vision_tail,
)
from tests.conftest import VISION_FAMILIES, VOCABULARY, text_config, vision_config

ALL = dict.fromkeys(("vision_model", "projectors", "cross_attentions", "language_model"), 1e-3)
FIRST = {**ALL, "vision_model": "frozen", "language_model": "frozen"}


def make(method="hive", vision="siglip", language="llama", **options):
    torch.manual_seed(0)
    backbones = (vision_config(vision), text_config(language))
    if method == "sa":
        return SelfAttentionForConditionalGeneration.from_backbones(
            *backbones, image_token_id=VOCABULARY - 1, **options
        )
    return HiveForConditionalGeneration.from_backbones(*backbones, **options)


def loss_of(model):
    """Loss of two captions with their images, always the same ones."""
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, 6))
    if isinstance(model, SelfAttentionForConditionalGeneration):
        count = model.config.image_seq_length
        ids = torch.cat([torch.full((2, count), VOCABULARY - 1), ids], dim=1)
    pixels = torch.randn(2, 3, 32, 32).to(model.dtype)
    return model(input_ids=ids, pixel_values=pixels, labels=ids).loss


def backward(model):
    """Gradients from a loss over a caption and an image, for every parameter."""
    model.requires_grad_(True)
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2", "vit"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hive", {}),
        ("hive", {"layer_selection": [2, 5]}),
        ("sa", {"feature_layer": -1}),
        ("sa", {"feature_layer": -2}),
    ],
)
def test_vision_tail_is_exactly_what_gets_no_gradient(vision, method, options):
    model = make(method, vision, **options)
    for module in getattr(model, "cross_attentions", []):  # let the image through
        torch.nn.init.normal_(module.o_proj.weight)
    gradients = backward(model)
    groups = parameter_groups(model)
    assert groups.keys() == gradients.keys()
    for name, group in groups.items():
        assert (gradients[name] is None) == (group == "vision_tail"), name


def test_groups_of_both_model_kinds():
    assert set(parameter_groups(make("hive")).values()) == set(GROUPS)
    assert set(parameter_groups(make("sa")).values()) == set(GROUPS) - {"cross_attentions"}


def test_rules_freeze_exactly_what_they_say():
    model = make()
    parts = {part.rule: part for part in apply_rules(model, FIRST)}
    assert parts["projectors"].learning_rate == 1e-3
    assert parts["language_model"].learning_rate is None
    groups = parameter_groups(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (groups[name] in ("projectors", "cross_attentions"))
    assert sum(part.size for part in parts.values()) == sum(p.numel() for p in model.parameters())


def test_freezing_comes_only_from_the_current_stage():
    model = make()
    apply_rules(model, FIRST)
    apply_rules(model, ALL)
    groups = parameter_groups(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (groups[name] != "vision_tail")


def test_first_fitting_rule_holds():
    rules = {"language_model.*embed_tokens*": "frozen", **ALL}
    model = make()
    parts = apply_rules(model, rules)
    frozen = {n for part in parts if part.learning_rate is None for n in part.names}
    assert "language_model.model.embed_tokens.weight" in frozen
    assert "language_model.model.embed_tokens.weight" not in parts[-1].names
    assert not model.language_model.model.embed_tokens.weight.requires_grad


def test_rule_for_a_group_of_another_method_is_no_error():
    apply_rules(make("sa"), ALL)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"projectors": 1e-3, "cross_attentions": 1e-3, "vision_model": 1.0}, "language_model"),
        ({**ALL, "vision_tail": 1e-3}, "vision_tail cannot be trained"),
        ({"projektors": 1e-3, **ALL}, "did you mean 'projectors'"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(ValueError, match=message):
        apply_rules(make(), rules)


@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_zero_output_that_stage_one_freezes_is_refused(gate):
    model = make(cross_attention_gate=gate)
    apply_rules(model, {**FIRST, "cross_attentions": "frozen"})
    with pytest.raises(ValueError, match="zero output or gate"):
        check_gradient_path(model)
    apply_rules(model, FIRST)
    check_gradient_path(model)
    apply_rules(make("sa"), FIRST)
    check_gradient_path(make("sa"))


def test_table_names_every_part():
    table = describe_parts(apply_rules(make(), FIRST))
    assert len(table.splitlines()) == 5
    assert "language_model" in table
    assert "frozen" in table
    assert "0.001" in table


def hashes(model):
    tensors = dict(model.named_parameters())
    return hash_tensors(tensors, tensors)


def test_proof_accepts_what_was_asked_for():
    model = make()
    parts, before = apply_rules(model, FIRST), hashes(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(1e-6 + name.count("a"))
    proof = prove_update(parts, before, hashes(model))
    assert proof["language_model"]["moved"] == 0
    assert proof["projectors"]["unchanged"] == 0


TAILS = {  # what of each family sees one token
    "clip": {"post_layernorm"},
    "siglip": {"post_layernorm", "head"},
    "dinov2": {"layernorm"},
    "vit": {"layernorm", "pooler"},
    "dinov3": {"norm"},
    "aimv2": {"rms_norm", "head"},
    "timm": set(),  # all of it is one child
}


@pytest.mark.parametrize(
    ("method", "vision", "options"),
    [
        *(("hive", vision, {}) for vision in VISION_FAMILIES),
        *(("sa", vision, {}) for vision in VISION_FAMILIES if vision != "timm"),
        ("hive", "siglip", {"layer_selection": [2, 5]}),
        ("sa", "siglip", {"feature_layer": -2}),
    ],
)
def test_sparing_the_vision_tail_changes_no_loss_and_no_gradient(method, vision, options):
    model, seen = make(method, vision, **options).double(), {}
    for module in getattr(model, "cross_attentions", []):  # let the image through
        torch.nn.init.normal_(module.o_proj.weight)
    loss, gradients = loss_of(model), backward(model)
    spare_vision_tail(model, parameter_groups(model))
    for name in TAILS[vision]:
        backbones_of(model)[0].get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].shape[-2]})
        )
    assert torch.equal(loss_of(model), loss)
    tokens = {"clip": 2}.get(vision, 1)  # CLIP's has rows of images, not of tokens
    assert seen == dict.fromkeys(TAILS[vision], tokens)
    model.zero_grad()
    for name, gradient in backward(model).items():
        expected = gradients[name]
        assert gradient is expected is None or torch.equal(gradient, expected), name


def test_a_recipe_spares_the_vision_tail_whatever_its_attention(recipe):
    def refuse_meta(module, query, key, value, mask, **options):
        assert query.device.type != "meta"
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("refuses_meta", refuse_meta)
    model, seen = make(), []
    prepare_model(model, recipe(attention="refuses_meta"))
    prepare_model(model, recipe(attention="refuses_meta"))
    model.vision_model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    loss_of(model)
    assert seen == [(2, 1, 32)]


def test_a_head_that_reads_a_padding_mask_is_left_alone():
    model, seen = make(vision="naflex"), []
    spare_vision_tail(model, parameter_groups(model))
    model.vision_model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    images = blank_images(model.config.vision_config)
    model(input_ids=torch.randint(3, 90, (1, 6)), **images)
    assert seen == [images["pixel_values"].shape[1]]


def test_a_tail_that_needs_the_whole_grid_is_left_alone(monkeypatch):
    def of_a_grid(self, states):
        return states.view(-1, 4, 4, states.shape[-1]).mean((1, 2))

    monkeypatch.setattr(SiglipMultiheadAttentionPoolingHead, "forward", of_a_grid)
    model = make()
    spare_vision_tail(model, parameter_groups(model))
    loss_of(model)


def test_proof_finds_a_frozen_tensor_that_moved_by_one_bit():
    model = make()
    parts, before = apply_rules(model, FIRST), hashes(model)
    for part in parts:
        if part.learning_rate is not None:
            torch.nn.init.ones_(model.get_parameter(part.names[0]))
    weight = next(model.vision_model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
    with pytest.raises(RuntimeError, match="vision_model is frozen, but"):
        prove_update(parts, before, hashes(model))


def test_proof_finds_a_trained_part_that_stood_still():
    model = make()
    parts = apply_rules(model, FIRST)
    with pytest.raises(RuntimeError, match="should have trained"):
        prove_update(parts, hashes(model), hashes(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_no_graph_where_no_gradient_is_needed(stage, checkpointing, recipe):
    """In stage 1 none below the first cross-attention, in 1 and 2 none of the encoder."""
    model = make(decoder_layers=[3, 4])
    apply_rules(model, FIRST if stage == 1 else {**ALL, "vision_model": "frozen"})
    prepare_model(model.train(), recipe(gradient_checkpointing=checkpointing))
    has_graph = {}

    def note(name):
        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            has_graph.setdefault(name, states.requires_grad)

        return hook

    layers = model.language_model.base_model.layers
    for number, layer in enumerate(layers, start=1):
        layer.register_forward_hook(note(number))
    model.vision_model.encoder.layers[-1].register_forward_hook(note("vision"))
    ids = torch.randint(3, 90, (2, 6))
    model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32), labels=ids).loss.backward()
    text = stage == 2
    assert has_graph == {1: text, 2: text, 3: True, 4: True, "vision": False}


@pytest.mark.parametrize("method", ["hive", "sa"])
def test_freezing_changes_no_gradient_of_what_is_trained(method):
    """An encoder's graph and layers below the first cross-attention are spared: not needed."""
    model = make(method).double()
    for module in getattr(model, "cross_attentions", []):  # let the image through
        torch.nn.init.normal_(module.o_proj.weight)
    everything = backward(model)
    for rules in (FIRST, {**ALL, "vision_model": "frozen"}):
        apply_rules(model, rules)
        model.zero_grad()
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, everything[name], rtol=1e-9, atol=1e-12)
            else:
                assert parameter.grad is None
