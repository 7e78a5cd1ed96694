import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.models.backbones import blocks_of
from hive_vision.models.cpu_attention import CPU_ATTENTION
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.training import hardware
from hive_vision.training.hardware import (
    peak_memory,
    precision_on,
    prepare_model,
    split_batch,
    training_arguments,
)
from tests.models.helpers import open_cross_attentions
from tests.training.conftest import stage


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 8))
def test_global_batch_is_split_exactly(batch_size, micro_batch_size, world_size):
    if batch_size % world_size:
        with pytest.raises(ValueError, match="multiple"):
            split_batch(batch_size, micro_batch_size, world_size)
        return
    micro, accumulation = split_batch(batch_size, micro_batch_size, world_size)
    assert micro * accumulation * world_size == batch_size
    assert micro <= micro_batch_size


def test_stage_becomes_arguments(recipe, tmp_path):
    arguments = recipe(micro_batch_size=3, precision="float32", sharding="fsdp2")
    settings = stage(1, batch_size=12, betas=(0.8, 0.95), warmup=0.03, weight_decay=0.1)
    translated = training_arguments(arguments, settings, tmp_path, 581, ["CrossAttention"], 3)
    assert translated.per_device_train_batch_size == 3
    assert translated.gradient_accumulation_steps == 4
    assert translated.dataloader_num_workers == 3
    assert (translated.adam_beta1, translated.adam_beta2) == (0.8, 0.95)
    assert (translated.weight_decay, translated.get_warmup_steps(581)) == (0.1, 18)
    assert not translated.bf16
    assert translated.optim == "adamw_torch_fused"
    assert not translated.fsdp, "one process has nothing to shard"


def test_peak_memory_is_that_of_this_process():
    assert 2**20 < peak_memory() < 2**40


@pytest.mark.parametrize("has_amx", [True, False])
def test_precision_follows_the_hardware(monkeypatch, has_amx):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)  # is not enough
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    assert precision_on("cpu", "auto") == (torch.bfloat16 if has_amx else torch.float32)
    assert precision_on("cpu", "float32") == torch.float32
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert precision_on("cuda", "auto") == torch.float32, "an emulated one does not count"
    assert precision_on("cuda", "float16") == torch.float16


@pytest.fixture
def model(backbone_folders):
    folders = backbone_folders["siglip"], backbone_folders["llama"]
    model = HiveForConditionalGeneration.from_backbones(*folders)
    open_cross_attentions(model)
    return model


def attentions(model):
    parts = (model, model.vision_model, model.language_model)
    return {part.config._attn_implementation for part in parts}


def test_attention_is_chosen(recipe, model):
    prepare_model(model, recipe())
    assert attentions(model) == {CPU_ATTENTION}
    prepare_model(model, recipe(attention="eager"))
    assert attentions(model) == {"eager"}
    prepare_model(model, recipe())  # whoever chose something else keeps it
    assert attentions(model) == {"eager"}
    with pytest.raises(ValueError, match=r"attention is 'fast'.*use auto, sdpa or eager") as error:
        prepare_model(model, recipe(attention="fast"))
    assert "\n" not in str(error.value)


def test_compiled_blocks_compute_the_same(recipe, model, monkeypatch):
    """Loss and gradients, with captions of two lengths; captured, but not turned into C++."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr("torch.nn.Module.compile", lambda m: compile_block(m, backend="aot_eager"))
    batches = [
        {
            "pixel_values": torch.randn(2, 3, 32, 32),
            "input_ids": torch.randint(3, 200, (2, length)),
            "labels": torch.randint(3, 200, (2, length)),
        }
        for length in (5, 9)
    ]

    def run():
        model.zero_grad()
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return torch.stack(losses).detach(), grads

    prepare_model(model.train(), recipe())
    keys = list(model.state_dict())
    losses, grads = run()
    prepare_model(model, recipe(compile=True))
    assert all(block._compiled_call_impl is not None for block in blocks_of(model))
    compiled_losses, compiled_grads = run()
    torch.testing.assert_close(compiled_losses, losses)
    torch.testing.assert_close(compiled_grads, grads, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == keys


def test_bfloat16_autocast_computes_nearly_the_same(recipe, model):
    """Loss within 1%, gradients as a whole within 3 degrees, with the attention for CPUs."""
    prepare_model(model.train(), recipe())
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (4, 9))
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "input_ids": ids, "labels": ids}
    losses, grads = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*grads, dim=0) > 0.9986


@pytest.mark.parametrize("wanted", [True, False])
def test_memory_is_kept_as_the_recipe_says(model, recipe, monkeypatch, wanted):
    kept = []
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(hardware, "this_device", lambda: "cpu")
    prepare_model(model, recipe(keep_freed_memory=wanted))
    assert bool(kept) == wanted


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_is_kept():
    program = (
        "import psutil; from hive_vision.training.hardware import keep_freed_memory as keep\n"
        "def lost():\n"
        "    block = b'x' * 2**26; before = psutil.Process().memory_info().rss\n"
        "    del block; return before - psutil.Process().memory_info().rss\n"
        "first = lost(); keep(); print(first, lost())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    returned, kept = map(int, printed.stdout.split())
    assert returned > 2**25, "the system would get it back"
    assert kept < 2**22
