"""Devices by name, in any spelling."""

import pytest
import torch

from hive_vision.analysis.devices import GIB, USABLE, find_device, measured_speed


@pytest.mark.parametrize("name", ["RTX 3090", "rtx3090", "rtx-3090"])
def test_a_gpu_in_any_spelling(name: str) -> None:
    device = find_device(name)
    assert device.name == "RTX 3090"
    assert device.memory == 24 * GIB * USABLE
    assert device.flops_per_second == 71e12
    assert find_device(name, torch.float32).flops_per_second < 71e12


@pytest.mark.parametrize("name", ["RTX 309", "xyz", "A100"])
def test_an_unknown_device_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="unknown device") as error:
        find_device(name)
    assert "\n" not in str(error.value)


def test_the_cpu_is_measured() -> None:
    device = find_device("cpu")
    assert device.kind == "cpu"
    assert device.memory > GIB / 2
    assert 1e8 < device.flops_per_second < 1e15


def test_every_assumed_share_says_where_it_comes_from() -> None:
    for name in ("cpu", "H100"):
        device = find_device(name)
        assert 0 < device.share < 1
        assert "assumed" in device.share_reason


def test_a_cpu_comes_nearer_to_its_speed_in_float32() -> None:
    assert find_device("cpu", torch.float32).share > find_device("cpu", torch.bfloat16).share


def test_measured_speed_is_that_of_the_fastest_product() -> None:
    assert measured_speed("cpu", torch.float32, seconds=0.01) > 1e8
