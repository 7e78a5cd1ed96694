"""The loader's speed: what is read, and what is concluded. No number of it depends on a clock."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hive_vision.data.captions import CaptionDataset
from hive_vision.folders import write_json
from hive_vision.studies.data_bench import bench_data, workers_needed
from hive_vision.studies.plan import make_plan
from hive_vision.training.feature_cache import NOTE
from hive_vision.training.run_folder import RunFolder
from tests.studies.test_data_checks import recipe


@pytest.mark.parametrize(
    ("per_second", "expected"),
    [
        (None, (None, False)),
        (9.0, (0, False)),  # an eleventh of the time is spent on reading
        (11.0, (1, False)),
        (72.0, (1, False)),
        (73.0, (2, False)),  # no tenth to spare
        (200.0, (4, False)),
        (400.0, (6, True)),  # a worker alone gives most: 440 / 80 of them
        (273.0, (5, True)),  # as many as were tried are too slow, whatever one gives alone
    ],
)
def test_workers_needed(per_second: float | None, expected: tuple[int | None, bool]) -> None:
    assert workers_needed({0: 100.0, 1: 80.0, 2: 150.0, 4: 300.0}, per_second) == expected


def test_a_stage_against_the_plan(
    backbone_folders: dict[str, Path], image_folder: Path, tmp_path: Path
) -> None:
    arguments = recipe(
        *(backbone_folders, image_folder, tmp_path / "run"),
        *("data.num_workers=3", "micro_batch_size=4"),
    )
    bench = bench_data(arguments, seconds=0, device="H100")
    assert set(bench["rates"]) >= {0, 1, 3}
    assert all(rate > 0 for rate in bench["rates"].values())
    assert sum(bench["shares"].values()) == pytest.approx(1)
    assert (bench["image_side"], bench["resized_to"]) == (32, 32)
    assert (bench["key"], bench["num_workers"]) == ("data.num_workers", 3)
    for stage, planned in zip(bench["stages"], make_plan(arguments, "H100")["stages"], strict=True):
        steps_in_an_hour = planned["steps"] / planned["hours"]
        assert stage["per_second"] * 3600 == pytest.approx(steps_in_an_hour * planned["batch_size"])
        assert "H100" in stage["source"]
    assert not (tmp_path / "run").exists()


def test_a_stage_against_a_run(
    backbone_folders: dict[str, Path], image_folder: Path, tmp_path: Path
) -> None:
    def bench(*overrides: str) -> list[tuple[float, str]]:
        arguments = recipe(backbone_folders, image_folder, tmp_path / "run", *overrides)
        stages = bench_data(arguments, seconds=0)["stages"]
        return [(stage["per_second"], stage["source"]) for stage in stages]

    arguments = recipe(backbone_folders, image_folder, tmp_path / "run")
    run = RunFolder(arguments)
    run.create()
    for number, name in enumerate(arguments.stages):
        assert bench()[0][1].startswith("plan for ")  # until all are finished
        run.stage(name).mkdir()
        write_json(run.stage(name) / "result.json", {"seconds_per_step": 0.5 + number})
    expected = [
        (stage.batch_size / (0.5 + number), str(tmp_path / "run"))
        for number, stage in enumerate(arguments.stages.values())
    ]
    assert bench() == expected
    assert bench("data.num_workers=1", "data.holdout=0.3") == expected
    assert bench("stage1.batch_size=8")[0][1].startswith("plan for ")  # another step
    write_json(run.stage("stage1") / NOTE, {"is_used": True, "why": "..."})
    write_json(run.stage("stage2") / NOTE, {"is_used": False, "why": "..."})
    assert bench() == expected[1:]  # the first reads no images
    write_json(run.stage("stage3") / "result.json", {"seconds_per_step": 0.0})
    assert bench()[0][1].startswith("plan for ")  # nothing of the last one was timed


def test_no_image_twice(
    backbone_folders: dict[str, Path],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even with another number of workers: it would come from memory."""
    read: Counter[int] = Counter()
    plain = CaptionDataset.__getitem__

    def count(self: CaptionDataset, row: int) -> Any:
        (tmp_path / "read").open("a").write(f"{row}\n")
        return plain(self, row)

    monkeypatch.setattr(CaptionDataset, "__getitem__", count)
    arguments = recipe(
        *(backbone_folders, image_folder, tmp_path / "run"), *("micro_batch_size=1",)
    )
    bench_data(arguments, seconds=0, device="H100")
    read.update((tmp_path / "read").read_text().split())
    assert max(read.values()) == 1
    assert sum(read.values()) > 6


def test_conversations(vlm_recipe: Any) -> None:
    bench = bench_data(vlm_recipe(micro_batch_size=2), "stage2", seconds=0)
    assert bench["unit"] == "conversations"
    assert bench["key"] == "data.stage2.num_workers"
    (stage,) = bench["stages"]
    assert (stage["name"], stage["per_second"], stage["workers"]) == ("stage2", None, None)
