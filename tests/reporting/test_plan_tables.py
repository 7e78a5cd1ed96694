"""Every number of a plan stands in its report."""

from typing import Any

from rich.console import Console

from hive_vision.reporting.plan_tables import plan_report

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "waiting", "activations", "temporaries")


def memory(first: int) -> dict[str, float]:
    sizes = {part: (first + index) * GIB for index, part in enumerate(PARTS)}
    return {**sizes, "total": sum(sizes.values())}


def plan(**changes: Any) -> dict[str, Any]:
    stage = {
        "name": "stage1",
        "trained_parameters": 123456,
        "steps": 2326,
        "warmup_steps": 70,
        "micro_batch_size": 8,
        "accumulation": 32,
        "flops_per_caption": 477e9,
        "flops": 3e17,
        "hours": 1.25,
        "fits": False,
        "devices_needed": None,
        "measured": None,
        "memory": {
            "plain": {
                "at_micro_batch": memory(10),
                "largest_micro_batch": 64,
                "at_largest": memory(30),
            },
            "checkpointed": {
                "at_micro_batch": memory(50),
                "largest_micro_batch": None,
                "at_largest": None,
            },
        },
    }
    return {
        "method": "hive",
        "vision": "a",
        "language": "b",
        "precision": "bfloat16",
        "sharding": "none",
        "devices": 2,
        "device": {
            "name": "H100",
            "kind": "cuda",
            "memory": 72 * GIB,
            "memory_reason": "why so",
            "flops_per_second": 989e12,
            "share": 0.4,
            "share_reason": "because",
        },
        "captions": {"tokens": 15.5, "longest": 77, "samples": None, "source": "assumed"},
        "parameters": {"projectors": 17349888},
        "stages": [stage],
        "hours": 1.25,
        **changes,
    }


def text(content: dict[str, Any]) -> str:
    console = Console(width=160, record=True, highlight=False)
    with console.capture() as captured:
        for part in plan_report(content):
            console.print(part)
    return captured.get()


def test_everything_is_said() -> None:
    report = text(plan())
    for number in ("17,349,888", "123,456", "2326 (70)", "8 x 32 x 2", "477", "0.3", "1.25"):
        assert number in report
    for size in (10, 15, 30, 35, 50, 55):
        assert f"{size}.00" in report
    for word in ("2 x H100", "no", "64 fit", "none", "15.5 tokens", "77 at most", "40%", "why so"):
        assert word in report
    assert "fsdp2" not in report


def test_sharding_is_said_to_be_an_estimate() -> None:
    assert "estimate" in text(plan(sharding="fsdp2"))
    assert "estimate" not in text(plan(sharding="fsdp2", devices=1))


def test_what_was_measured_stands_beside_what_was_predicted() -> None:
    measured = {
        **{"micro_batch": 8, "tokens": 77, "seconds": 3.5, "predicted_seconds": 4.5},
        **{"optimizer_seconds": 0.25, "memory": 6 * GIB, "predicted_memory": 5 * GIB},
    }
    made = plan()
    made["stages"][0]["measured"] = measured
    report = text(made)
    for words in ("8 x 77", "3.5 (4.5)", "0.25", "6.00 (5.00)", "three steps of each stage"):
        assert words in report
    assert "40%" not in report
