"""What devices hold and how fast they compute: a small table, or the machine at hand."""

import os
import time
from dataclasses import dataclass

import torch

from hive_vision.naming import unknown_name

GIB = 2**30

# Makers' data sheets: memory in GiB as the driver shows it, TFLOP/s without sparsity for bfloat16
# with float32 accumulation, and for float32 without TF32.
_GPUS: dict[str, tuple[float, float, float]] = {
    "RTX 3090": (24, 71, 35.6),
    "RTX 4090": (24, 165, 82.6),
    "RTX 5090": (32, 209, 104.8),
    "A10": (24, 125, 31.2),
    "L4": (24, 121, 30.3),
    "A40": (48, 150, 37.4),
    "L40S": (48, 362, 91.6),
    "A100 40GB": (40, 312, 19.5),
    "A100 80GB": (80, 312, 19.5),
    "H100": (80, 989, 67),
    "H200": (140, 989, 67),
    "B200": (179, 2250, 75),
}

USABLE = 0.9
USABLE_REASON = "10% of the memory are left for the driver's context, workspaces and fragmentation"

_GPU_SHARE = 0.4
_GPU_SHARE_REASON = (
    "assumed, not measured on this device: PaLM's paper (2022, table 3) reports 21% to 46% for "
    "large models; autocast and small kernels cost models of this size more"
)
_CPU_SHARE, _CPU_SHARE_FLOAT32 = 0.5, 0.7
_CPU_SHARE_REASON = (
    "assumed of the matrix product just measured: HIVE at the paper's sizes reached 48% to 57% "
    "of it on one CPU thread in bfloat16, 50% to 78% on two in float32"
)


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: As people call it.
        kind: ``cuda`` or ``cpu``.
        memory: Bytes that a run can use.
        flops_per_second: Of matrix products in the run's precision.
        share: Of that speed which training is assumed to reach.
        share_reason: Where that number comes from.
    """

    name: str
    kind: str
    memory: float
    flops_per_second: float
    share: float
    share_reason: str


def find_device(name: str | None, precision: torch.dtype | None = None) -> Device:
    """Look a device up, or the one of this machine.

    Args:
        name: ``cpu`` or a GPU of the table; what this machine has, if not given.
        precision: Of the products; bfloat16 on a GPU and float32 on a CPU if not given.

    Raises:
        ValueError: If the table has no such GPU.
    """
    if name is None:
        return _this_gpu(precision) if torch.cuda.is_available() else _this_cpu(precision)
    if name.lower() == "cpu":
        return _this_cpu(precision)
    found = {known.lower().replace(" ", ""): known for known in _GPUS}
    known = found.get(name.lower().replace(" ", "").replace("-", ""))
    if known is None:
        raise ValueError(unknown_name("device", name, ["cpu", *_GPUS]))
    gibibytes, half, single = _GPUS[known]
    speed = 1e12 * (single if precision == torch.float32 else half)
    return Device(known, "cuda", gibibytes * GIB * USABLE, speed, _GPU_SHARE, _GPU_SHARE_REASON)


def _this_gpu(precision: torch.dtype | None) -> Device:
    memory = torch.cuda.get_device_properties(0).total_memory * USABLE
    speed = measured_speed("cuda", precision or torch.bfloat16)
    name = torch.cuda.get_device_name(0)
    return Device(name, "cuda", memory, speed, _GPU_SHARE, _GPU_SHARE_REASON)


def _this_cpu(precision: torch.dtype | None) -> Device:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * USABLE
    precision = precision or torch.float32
    speed = measured_speed("cpu", precision)
    name = f"CPU, {torch.get_num_threads()} threads"
    share = _CPU_SHARE_FLOAT32 if precision == torch.float32 else _CPU_SHARE
    return Device(name, "cpu", memory, speed, share, _CPU_SHARE_REASON)


def measured_speed(kind: str, precision: torch.dtype, seconds: float = 0.3) -> float:
    """Measure matrix products for a moment: operations per second of the fastest."""
    size = 8192 if kind == "cuda" else 1024
    matrix = torch.randn(size, size, device=kind).to(precision)

    def product() -> float:
        start = time.perf_counter()
        corner = (matrix @ matrix)[0, 0]
        if kind == "cuda":
            corner.item()  # waits
        return time.perf_counter() - start

    product()  # kernels are chosen and loaded
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, product())
    return 2 * size**3 / best
