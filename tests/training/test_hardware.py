import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.training.hardware import peak_memory, split_batch, training_arguments
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
    assert not translated.fsdp, "one process has nothing to shard"


def test_peak_memory_is_that_of_this_process():
    assert 2**20 < peak_memory() < 2**40
