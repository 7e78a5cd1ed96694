"""What runs did: losses with their spread, what moved, what it cost; gaps where nothing is."""

import json
from pathlib import Path

import numpy as np
from scipy import stats

from hive_vision.reporting.report import Gallery, Section, TitledTable
from hive_vision.reporting.run_facts import Series, read_run
from hive_vision.reporting.run_sections import (
    curves_section,
    loss_section,
    proof_section,
    unfinished,
)
from tests.reporting.run_folders import finetune_run, pretrain_run, record_gradients, write


def one(folder: Path) -> Series:
    return Series(folder.name, [read_run(folder, folder.name)])


def rows(section: Section | None, title: str) -> dict[str, list[str]]:
    assert section is not None
    (table,) = [b for b in section.blocks if isinstance(b, TitledTable) and b.title == title]
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.grid.rows}


def test_losses_and_cost(tmp_path: Path) -> None:
    series = [
        one(pretrain_run(tmp_path / "base", "base", loss=1.5)),
        one(pretrain_run(tmp_path / "hive", loss=1.25)),
        one(finetune_run(tmp_path / "vlm")),
        one(pretrain_run(tmp_path / "late", finished=False)),
    ]
    section = loss_section(series)
    assert rows(section, "After the last stage") == {
        "base": ["1.500", "-", "0", "-", "1.50 GiB"],
        "hive": ["1.250", "1.750", "1,234", "0.50 / 0.50", "1.50 GiB"],
        "vlm": ["1.250", "1.750", "1,234", "0.50 / 0.50", "1.00 GiB"],
        "late": ["-", "-", "-", "0.50", "-"],
    }
    by_stage = rows(section, "Held-out loss after each stage")
    assert by_stage["stage1"] == ["-", "1.250 (1.750)", "1.250 (1.750)", "1.250 (1.750)"]
    assert by_stage["stage2"] == ["-", "1.250 (1.750)", "1.250 (1.750)", "-"]


def test_several_seeds_have_a_spread(tmp_path: Path) -> None:
    folders = [pretrain_run(tmp_path / str(n), loss=loss) for n, loss in enumerate((1.0, 1.2))]
    section = loss_section([Series("hive", [read_run(f, f.name) for f in folders])])
    assert rows(section, "After the last stage")["hive"][0] == "1.100 ±0.141"
    assert "standard deviation" in str(section)


def test_nothing_finished_is_no_table(tmp_path: Path) -> None:
    folder = pretrain_run(tmp_path / "hive", finished=False)
    (folder / "stage1" / "result.json").unlink()
    assert loss_section([one(folder)]) is None
    assert proof_section([one(folder)]) is None
    assert curves_section([one(folder)]) is not None, "the log of its first steps is there"
    (folder / "metrics.jsonl").unlink()
    assert curves_section([one(folder)]) is None


def test_what_moved_and_what_stayed(tmp_path: Path) -> None:
    series = [one(pretrain_run(tmp_path / "base", "base")), one(pretrain_run(tmp_path / "hive"))]
    found = rows(proof_section(series), "Tensors")
    assert found["stage1: projectors"] == ["-", "4 moved"]
    assert found["stage2: vision_model"] == ["-", "195 stayed"]


def test_a_proof_that_is_not_the_same_for_each_seed(tmp_path: Path) -> None:
    folders = [pretrain_run(tmp_path / name) for name in "ab"]
    path = folders[1] / "results.json"
    results = json.loads(path.read_text())
    results["stages"][0]["update_proof"]["projectors"] = {"moved": 3, "unchanged": 1}
    write(path, results)
    series = Series("hive", [read_run(folder, folder.name) for folder in folders])
    found = rows(proof_section([series]), "Tensors")
    assert found["stage1: projectors"] == ["4 moved; 3 moved, 1 stayed"]


def test_probes_after_stages(tmp_path: Path) -> None:
    folder = pretrain_run(tmp_path / "hive")
    results = json.loads((folder / "results.json").read_text())
    found = {"base": 0.5, "now": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15}
    results["stages"][1]["probe"] = {"texture": found}
    write(folder / "results.json", results)
    section = loss_section([one(folder)])
    assert rows(section, "The encoder after each stage") == {
        "stage2: texture": ["+10.0 [+5.0, +15.0]"]
    }


def test_curves(tmp_path: Path) -> None:
    section = curves_section([one(pretrain_run(tmp_path / "hive"))])
    assert section is not None
    (gallery,) = [block for block in section.blocks if isinstance(block, Gallery)]
    assert len(gallery.pictures) == 2


def test_gradients_have_figures_and_over_seeds_an_interval(tmp_path: Path) -> None:
    runs = [pretrain_run(tmp_path / name) for name in "abc"]
    for run, early in zip(runs, (1.0, 2.0, 4.0), strict=True):
        record_gradients(run, [early, 0.5, 1.0], 10, 20)
    alone = curves_section([one(runs[0])])
    assert alone is not None
    _, _, text, gallery = alone.blocks
    assert "How much of the loss's gradient arrives" in str(text)
    assert isinstance(gallery, Gallery)
    assert len(gallery.pictures) == 1
    section = curves_section([Series("hive", [read_run(f, f.name) for f in runs])])
    found = rows(section, "Gradient in the first third of the layers")
    half = stats.t.ppf(0.975, 2) * np.log(2) / 3**0.5
    ends = f"{2 * np.exp(-half):.3g} to {2 * np.exp(half):.3g}"
    assert found == {"hive": [f"2 ({ends})", "1, 2, 4"]}


def test_what_is_lower_is_better_and_what_base_cannot_see(tmp_path: Path) -> None:
    hive = one(pretrain_run(tmp_path / "hive"))
    assert "lower is better" in str(loss_section([hive]))
    assert "The base has no" not in str(loss_section([hive]))
    base = one(pretrain_run(tmp_path / "base", "base"))
    assert "The base has no connection to images" in str(loss_section([base, hive]))


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    series = [
        one(pretrain_run(tmp_path / "done")),
        one(pretrain_run(tmp_path / "late", finished=False)),
    ]
    (sentence,) = unfinished(series)
    assert sentence.startswith("late is not finished: stage2, step 10 of 20.")
