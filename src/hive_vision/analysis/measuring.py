"""Memory that work on a CPU really allocates, to judge predictions by."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def measure_peak(work: Callable[[], object]) -> int:
    """Run something and give the largest sum of bytes that its tensors had at once.

    Read from PyTorch's allocator through its profiler, so what Python or the C library keep does
    not count, nor what was allocated before.

    Args:
        work: What to run; its tensors must be on the CPU.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], index, event["args"]["Bytes"])
        for index, event in enumerate(events)
        if event.get("name") == "[memory]"
    )
    alive = peak = 0
    for _, _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak
