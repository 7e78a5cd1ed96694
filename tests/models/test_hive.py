"""The whole model: against the equations, and everything that must not change its numbers."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from hive_vision.models.backbones import find_blocks
from hive_vision.models.hive import HiveForConditionalGeneration
from tests.conftest import LANGUAGE_FAMILIES, VISION_FAMILIES, text_config, vision_config
from tests.models.conftest import MakeHive
from tests.models.helpers import (
    COMBINATIONS,
    FUSED,
    PAIRS,
    PATCHES,
    PREFIX_TOKENS,
    add_noise,
    captions,
    images,
    open_cross_attentions,
    start_for,
)
from tests.models.reference import Options, reference_logits

# The families whose pieces tests/models/reference.py can put together by hand.
REFERENCE_PAIRS = PAIRS[:7]
ENCODER_DEPTH, DECODER_DEPTH = 5, 3
# selection -> encoder layers at density 0.4 (two of five), written down, not computed
SELECTIONS: dict[str, tuple[Any, list[int]]] = {
    "uniform": ("uniform", [3, 5]),
    "later": ("later", [4, 5]),
    "last": ("last", [5, 5]),
    "explicit": ([1, 4], [1, 4]),
}
HOST_LAYERS = [2, 3]


@pytest.fixture(scope="module")
def noisy_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shallow backbones in which every weight matters, far from their initialisation."""
    root = tmp_path_factory.mktemp("noisy")
    folders = {}
    torch.manual_seed(0)
    for vision, language in REFERENCE_PAIRS:
        encoder = AutoModel.from_config(vision_config(vision, ENCODER_DEPTH))
        decoder = AutoModelForCausalLM.from_config(text_config(language, DECODER_DEPTH))
        for name, model in ((vision, encoder), (language, decoder)):
            add_noise(model, 0.1)
            model.save_pretrained(root / name)
            folders[name] = root / name
    return folders


@pytest.fixture(scope="module")
def plain_models(noisy_folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """The same backbones without anything of ours."""
    return {
        name: (AutoModel if name in VISION_FAMILIES else AutoModelForCausalLM)
        .from_pretrained(folder)
        .eval()
        for name, folder in noisy_folders.items()
    }


def combinations() -> list[Any]:
    """Every combination of the options, the backbones taking turns."""
    cases = []
    for start in ("host", "random"):
        # Seven pairs and options with two or four values: each option meets each pair.
        pairs = itertools.cycle(
            ("vit", "opt") if start == "host" and language == "neox" else (vision, language)
            for vision, language in REFERENCE_PAIRS
        )
        options = itertools.product(
            SELECTIONS, (True, False), (True, False), (True, False), ("none", "tanh"), (True, False)
        )
        for (selection, norm, residual, shared, gate, qk_norm), pair in zip(
            options, pairs, strict=False
        ):
            flags = [
                name
                for name, on in [
                    ("norm", norm),
                    ("residual", residual),
                    ("shared", shared),
                    ("gate", gate == "tanh"),
                    ("qk", qk_norm),
                ]
                if on
            ]
            fusion = {
                "layer_density": 0.4,
                "projector_norm": norm,
                "projector_residual": residual,
                "projector_shared": shared,
                "cross_attention_gate": gate,
                "cross_attention_qk_norm": qk_norm,
                "cross_attention_start": start,
            }
            name = "-".join([*pair, start, selection, *flags])
            cases.append(pytest.param(*pair, selection, fusion, id=name))
    return cases


def test_every_combination_is_there() -> None:
    cases = combinations()
    assert len({case.id.partition("-")[2].partition("-")[2] for case in cases}) == 4 * 2**6
    assert {case.values[:2] for case in cases} == set(REFERENCE_PAIRS)


@pytest.mark.parametrize(("vision", "language", "selection", "fusion"), combinations())
@torch.no_grad()
def test_forward_pass_is_the_equations(
    vision: str,
    language: str,
    selection: str,
    fusion: dict[str, Any],
    noisy_folders: dict[str, Path],
    plain_models: dict[str, PreTrainedModel],
) -> None:
    given, encoder_layers = SELECTIONS[selection]
    torch.manual_seed(0)
    model = HiveForConditionalGeneration.from_backbones(
        noisy_folders[vision], noisy_folders[language], layer_selection=given, **fusion
    ).eval()
    open_cross_attentions(model)
    weights = model.state_dict()
    if fusion["cross_attention_start"] == "host":  # then they must be the plain model's own
        layers = find_blocks(plain_models[language], DECODER_DEPTH)
        for index, number in enumerate(HOST_LAYERS):
            for name, weight in layers[number - 1].self_attn.state_dict().items():
                if name.partition(".")[0] in ("q_proj", "k_proj", "v_proj"):
                    weights[f"cross_attentions.{index}.{name}"] = weight
    options = Options(
        encoder_layers=encoder_layers,
        host_layers=HOST_LAYERS,
        norm=fusion["projector_norm"],
        residual=fusion["projector_residual"],
        shared=fusion["projector_shared"],
        qk_norm=fusion["cross_attention_qk_norm"],
        gated=fusion["cross_attention_gate"] == "tanh",
    )
    pixel_values, input_ids = images(2), captions(2, 6)
    backbones = plain_models[vision], plain_models[language]
    expected = reference_logits(*backbones, weights, options, pixel_values, input_ids)
    logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    blind = backbones[1](input_ids).logits
    assert (logits - blind).abs().max() > 1e-2, "the image must matter for this to show anything"


@pytest.mark.parametrize(("vision", "language"), COMBINATIONS)
@torch.no_grad()
def test_start_is_exactly_the_language_model(
    vision: str, language: str, fresh_hive: MakeHive, backbone_folders: dict[str, Path]
) -> None:
    model = fresh_hive(vision, language)
    plain = AutoModelForCausalLM.from_pretrained(backbone_folders[language]).eval()
    encoder = AutoModel.from_pretrained(backbone_folders[vision]).eval()
    expected = plain(captions(2, 6)).logits
    assert torch.equal(model(input_ids=captions(2, 6), pixel_values=images(2)).logits, expected)
    assert torch.equal(model(input_ids=captions(2, 6)).logits, expected)
    assert torch.equal(model.language_model(captions(2, 6)).logits, expected)
    for ours, theirs in ((model.language_model, plain), (model.vision_model, encoder)):
        assert type(ours) is type(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(
            torch.equal(weight, theirs.state_dict()[name])
            for name, weight in ours.state_dict().items()
        )


@pytest.mark.parametrize("language", LANGUAGE_FAMILIES)
@torch.no_grad()
def test_closed_gate_is_exactly_the_language_model(
    language: str, backbone_folders: dict[str, Path]
) -> None:
    model = HiveForConditionalGeneration.from_backbones(
        backbone_folders["clip"],
        backbone_folders[language],
        cross_attention_gate="tanh",
        cross_attention_start=start_for(language),
    ).eval()
    expected = model(input_ids=captions(2, 6)).logits
    assert torch.equal(model(input_ids=captions(2, 6), pixel_values=images(2)).logits, expected)
    assert all(block.is_identity() for block in model.cross_attentions)
    assert all(block.o_proj.weight.any() for block in model.cross_attentions)


@pytest.mark.parametrize("language", FUSED)
def test_fused_projections_cannot_be_the_start(
    language: str, backbone_folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r" fuses its query.* set cross_attention_start to"):
        HiveForConditionalGeneration.from_backbones(
            backbone_folders["clip"], backbone_folders[language]
        )


def test_unknown_fusion_option_names_the_nearest(backbone_folders: dict[str, Path]) -> None:
    message = "unknown fusion option 'layer_densty'; did you mean 'layer_density'?"
    with pytest.raises(ValueError, match=message):
        HiveForConditionalGeneration.from_backbones(
            backbone_folders["clip"], backbone_folders["llama"], layer_densty=0.5
        )


def test_too_few_decoder_layers(backbone_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"8 encoder layers are selected but .* only 4 layers"):
        HiveForConditionalGeneration.from_backbones(
            backbone_folders["clip"], backbone_folders["llama"], layer_density=1.0
        )


def test_number_of_projectors_and_cross_attentions() -> None:
    options = {"layer_density": 0.5, "cross_attention_start": "random"}
    for shared, projectors in ((False, 4), (True, 1)):
        model = HiveForConditionalGeneration.from_backbones(
            vision_config("vit"), text_config("opt"), projector_shared=shared, **options
        )
        assert len(model.projectors) == projectors
        assert len(model.cross_attentions) == 4


# --- saving, loading, copying ---------------------------------------------------------------


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@torch.no_grad()
def test_round_trip_is_bit_for_bit(
    vision: str, language: str, open_hive: MakeHive, tmp_path: Path
) -> None:
    model = open_hive(vision, language)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": captions(2, 6), "pixel_values": images(2)}
    expected = model(**inputs).logits
    for auto in (HiveForConditionalGeneration, AutoModelForImageTextToText, AutoModel):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is HiveForConditionalGeneration
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), name
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert tied == model.config.text_config.tie_word_embeddings
        assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_both_kinds_of_embeddings_are_among_the_pairs() -> None:
    assert {text_config(language).tie_word_embeddings for _, language in PAIRS} == {True, False}


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@torch.no_grad()
def test_copies_are_independent(vision: str, language: str, open_hive: MakeHive) -> None:
    model = open_hive(vision, language)
    inputs = {"input_ids": captions(2, 6), "pixel_values": images(2)}
    expected = model(**inputs).logits
    copy = deepcopy(model)
    assert torch.equal(copy(**inputs).logits, expected)
    # The hooks must reach the copy's own blocks, and only those.
    for block in copy.cross_attentions:
        block.o_proj.weight.zero_()
        if block.o_proj.bias is not None:
            block.o_proj.bias.zero_()
    assert torch.equal(copy(**inputs).logits, copy(input_ids=inputs["input_ids"]).logits)
    assert torch.equal(model(**inputs).logits, expected)


# --- other ways to ask for the same numbers ---------------------------------------------------


@torch.no_grad()
def test_equivalent_inputs(open_hive: MakeHive) -> None:
    model = open_hive("clip", "llama")
    ids, pixel_values = captions(2, 6), images(2)
    expected = model(input_ids=ids, pixel_values=pixel_values).logits
    features = model.get_image_features(pixel_values)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(ids, image_features=features).logits, expected)
    assert torch.equal(model(ids, image_features=torch.stack(features, dim=1)).logits, expected)
    assert torch.equal(model(inputs_embeds=embedded, pixel_values=pixel_values).logits, expected)
    kept = model(ids, pixel_values, logits_to_keep=2).logits
    torch.testing.assert_close(kept, expected[:, -2:])
    chosen = model(ids, pixel_values, logits_to_keep=torch.tensor([0, 3])).logits
    torch.testing.assert_close(chosen, expected[:, [0, 3]])
    output = model(ids, pixel_values, labels=ids, return_logits=False)
    assert output.logits is None
    assert torch.equal(output.loss, model(ids, pixel_values, labels=ids).loss)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(
    vision: str, language: str, open_hive: MakeHive
) -> None:
    model = open_hive(vision, language)
    ids, pixel_values = captions(2, 6), images(2)
    expected = model(ids[1:, :4], pixel_values[1:]).logits
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    padded = model(ids, pixel_values, attention_mask=mask).logits
    torch.testing.assert_close(padded[1:, :4], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@torch.no_grad()
def test_eager_attention_is_sdpa(
    vision: str, language: str, open_hive: MakeHive, tmp_path: Path
) -> None:
    model = open_hive(vision, language)
    model.save_pretrained(tmp_path)
    eager = HiveForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    for wanted, part in (("sdpa", model), ("eager", eager.eval())):
        configs = [part.vision_model.config, part.language_model.config]
        configs += [block.config for block in part.cross_attentions]
        assert {config._attn_implementation for config in configs} == {wanted}
    inputs = {"input_ids": captions(2, 6), "pixel_values": images(2)}
    torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@torch.no_grad()
def test_asking_for_cross_attentions(vision: str, language: str, open_hive: MakeHive) -> None:
    model = open_hive(vision, language)
    inputs = {"input_ids": captions(2, 6), "pixel_values": images(2)}
    plain = model(**inputs)
    asked = model(**inputs, output_cross_attentions=True)
    tokens = PATCHES + PREFIX_TOKENS[vision]
    assert plain.cross_attentions is None
    assert len(asked.cross_attentions) == len(model.cross_attentions) == 2
    for weights in asked.cross_attentions:
        assert weights.shape == (2, 4, 6, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    assert not torch.equal(*asked.cross_attentions)
    torch.testing.assert_close(asked.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert model(captions(2, 6), output_cross_attentions=True).cross_attentions is None


# Qwen2, SmolLM3 and OLMo2 have Llama's loop.
@pytest.mark.parametrize(
    "language", [f for f in LANGUAGE_FAMILIES if f not in ("qwen2", "smollm3", "olmo2")]
)
def test_decoder_loop_compiles_without_a_graph_break(language: str) -> None:
    torch.manual_seed(0)
    model = HiveForConditionalGeneration.from_backbones(
        vision_config("siglip", 2),
        text_config(language, 2),
        layer_density=0.5,
        cross_attention_start="random",
    ).eval()
    open_cross_attentions(model)
    trunk = model.language_model.base_model
    with torch.no_grad():
        inputs = {
            "input_ids": captions(2, 6),
            "use_cache": False,
            "image_features": model.get_image_features(images(2)),
        }
        expected = trunk(**inputs).last_hidden_state
        torch.compiler.reset()
        compiled = torch.compile(trunk, fullgraph=True, backend="eager")
        result = compiled(**inputs).last_hidden_state
        assert not torch.equal(expected, trunk(captions(2, 6)).last_hidden_state)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# --- generation -----------------------------------------------------------------------------

FIXED_LENGTH = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}


def generate(model: HiveForConditionalGeneration, **inputs: Any) -> Any:
    return model.generate(
        **inputs, **FIXED_LENGTH, return_dict_in_generate=True, output_logits=True
    )


def without_prompt(output: Any, prompt_length: int) -> Tensor:
    return output.sequences[:, prompt_length:]


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_cache_changes_nothing(
    vision: str, language: str, num_beams: int, open_hive: MakeHive
) -> None:
    model = open_hive(vision, language)
    inputs = {"input_ids": captions(2, 4), "pixel_values": images(2), "num_beams": num_beams}
    cached, uncached = (generate(model, **inputs, use_cache=use) for use in (True, False))
    assert cached.sequences.shape == (2, 4 + 6)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_greedy_generation_is_repeated_argmax(
    vision: str, language: str, open_hive: MakeHive
) -> None:
    model = open_hive(vision, language)
    pixel_values, ids = images(2), captions(2, 4)
    output = generate(model, input_ids=ids, pixel_values=pixel_values)
    with torch.no_grad():
        logits = model(output.sequences[:, :-1], pixel_values).logits[:, -6:]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_with_left_padding_is_one_at_a_time(
    vision: str, language: str, num_beams: int, open_hive: MakeHive
) -> None:
    model = open_hive(vision, language)
    pixel_values, prompts = images(3), [captions(1, n, seed=n)[0] for n in (5, 2, 4)]
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    together = generate(
        model,
        input_ids=padded,
        attention_mask=mask,
        pixel_values=pixel_values,
        num_beams=num_beams,
    )
    for index, prompt in enumerate(prompts):
        alone = generate(
            model,
            input_ids=prompt[None],
            pixel_values=pixel_values[index : index + 1],
            num_beams=num_beams,
        )
        written = without_prompt(together, 5)[index]
        assert torch.equal(without_prompt(alone, len(prompt))[0], written), index


def test_images_change_what_is_written(open_hive: MakeHive) -> None:
    model = open_hive("clip", "llama")
    ids = captions(1, 3).expand(4, -1)
    options = {**FIXED_LENGTH, "return_dict_in_generate": True, "output_logits": True}
    first, *_ = model.generate(ids, pixel_values=images(4), **options).logits
    assert not torch.allclose(first[0], first[1])
    same, *_ = model.generate(ids, pixel_values=images(1).expand(4, -1, -1, -1), **options).logits
    torch.testing.assert_close(same[0], same[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "samples", "uncached"],
)
def test_an_image_is_encoded_once(options: dict[str, Any], open_hive: MakeHive) -> None:
    model, calls = open_hive("vit", "opt"), []
    handle = model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    output = model.generate(captions(2, 3), pixel_values=images(2), **{**FIXED_LENGTH, **options})
    handle.remove()
    assert output.shape == (2 * options.get("num_return_sequences", 1), 3 + 6)
    assert len(calls) == 1


def test_generation_starts_from_nothing_and_without_images(open_hive: MakeHive) -> None:
    model = open_hive("clip", "llama")
    text = model.generate(pixel_values=images(1), **FIXED_LENGTH)
    assert text.shape == (1, 1 + 6)
    assert text[0, 0] == model.generation_config.bos_token_id
    prompt = captions(1, 3)
    assert torch.equal(
        model.generate(prompt, **FIXED_LENGTH),
        model.language_model.generate(prompt, **FIXED_LENGTH),
    )


# --- gradients ------------------------------------------------------------------------------


def gradients(model: HiveForConditionalGeneration) -> dict[str, Tensor]:
    """Gradients of a caption loss, by parameter name; parameters without one are left out."""
    model.zero_grad()
    ids = captions(2, 6)
    model(ids, images(2), labels=ids, return_logits=False).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_gradient_checkpointing_changes_no_gradient(
    vision: str, language: str, open_hive: MakeHive
) -> None:
    model = deepcopy(open_hive(vision, language)).train()
    calls = []
    model.cross_attentions[0].q_proj.register_forward_hook(lambda *_: calls.append("cross"))
    for name, blocks in (
        ("block", find_blocks(model.vision_model, 8)),
        ("host", find_blocks(model.language_model, 4)),
    ):
        first = next(module for module in blocks[0].modules() if _is_linear(module))
        first.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = gradients(model)
    assert sorted(calls) == ["block", "cross", "host"]
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    # Recomputed: what is inside a layer runs again.
    assert all(calls.count(part) >= 2 for part in ("block", "cross", "host"))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_every_group_gets_a_gradient(vision: str, language: str, open_hive: MakeHive) -> None:
    found = gradients(open_hive(vision, language))
    for prefix in (
        "projectors.0.up",
        "projectors.1.skip",
        "cross_attentions.0.k_proj",
        "cross_attentions.1.o_proj",
        "language_model",
        "vision_model patch_embed",
    ):
        start, *inside = prefix.split()
        reached = [
            gradient
            for name, gradient in found.items()
            if name.startswith(start) and all(part in name for part in inside)
        ]
        assert reached, prefix
        assert all(gradient.any() for gradient in reached), prefix


def test_early_encoder_blocks_are_reached_directly(open_hive: MakeHive) -> None:
    """Uniform selection: the loss reaches F_4 without passing blocks 5 to 8 (section 3.2)."""
    model = deepcopy(open_hive("clip", "llama"))
    blocks = find_blocks(model.vision_model, 8)
    blocks[4].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    found = gradients(model)
    reached = {name.split(".")[3] for name in found if name.startswith("vision_model.encoder")}
    assert reached == set("01234567")


@pytest.mark.parametrize("language", LANGUAGE_FAMILIES)
def test_stage_one_builds_no_graph_below_the_first_cross_attention(
    language: str, open_hive: MakeHive
) -> None:
    model = deepcopy(open_hive("clip", language)).train()
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    entering: list[bool] = []
    for layer in find_blocks(model.language_model, 4):
        layer.register_forward_pre_hook(
            lambda _, args: entering.append(args[0].requires_grad), prepend=True
        )
    found = gradients(model)
    assert model.config.host_layers == [2, 4]
    # What enters host layer 2 comes from a frozen layer 1; its cross-attention comes after.
    assert entering == [False, False, True, True]
    assert {name.split(".")[0] for name in found} == {"projectors", "cross_attentions"}


@pytest.mark.parametrize("vision", VISION_FAMILIES)
def test_a_frozen_encoder_builds_no_graph(vision: str, open_hive: MakeHive) -> None:
    model = deepcopy(open_hive(vision, "llama")).train()
    assert all(f.requires_grad for f in model.get_encoder_features(images(1)).values())
    model.vision_model.requires_grad_(False)
    features = model.get_encoder_features(images(1))
    assert sorted(features) == [4, 8]
    assert not any(feature.requires_grad for feature in features.values())


def test_loss_is_divided_by_the_global_count(open_hive: MakeHive) -> None:
    model, ids, pixel_values = open_hive("clip", "llama"), captions(4, 6), images(4)
    labels = ids.clone()
    labels[:, 0] = labels[0, 2:] = -100
    count = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole = model(ids, pixel_values, labels=labels).loss
        parts = [
            model(ids[rows], pixel_values[rows], labels=labels[rows], num_items_in_batch=count).loss
            for rows in (slice(0, 1), slice(1, 4))
        ]
    torch.testing.assert_close(sum(parts), whole)


@torch.no_grad()
def test_half_precision(open_hive: MakeHive) -> None:
    model = deepcopy(open_hive("siglip", "gemma3")).to(torch.bfloat16)
    ids = captions(2, 6)
    output = model(ids, images(2).bfloat16(), labels=ids, output_cross_attentions=True)
    expected = open_hive("siglip", "gemma3")(ids, images(2), labels=ids)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, atol=0.1, rtol=0.05)
