"""What was run: every fact from the run's files, once where it is the same for all."""

from collections.abc import Sequence
from pathlib import Path

from hive_vision.reporting.report import Section, TitledTable
from hive_vision.reporting.run_facts import Series, read_run
from hive_vision.reporting.run_setup import recipe_section, setup_section
from tests.reporting.run_folders import FINGERPRINT, finetune_run, pretrain_run


def one(folder: Path) -> Series:
    return Series(folder.name, [read_run(folder, folder.name)])


def tables(section: Section) -> dict[str, dict[str, list[str]]]:
    return {
        block.title: {row[0].text: [cell.text for cell in row[1:]] for row in block.grid.rows}
        for block in section.blocks
        if isinstance(block, TitledTable)
    }


def setup(*folders: Path) -> dict[str, dict[str, list[str]]]:
    series: Sequence[Series] = [one(folder) for folder in folders]
    return tables(setup_section(series))


def test_facts_of_one_run(tmp_path: Path) -> None:
    (facts,) = setup(pretrain_run(tmp_path / "hive")).values()
    assert facts == {
        "state": ["finished"],
        "method": ["hive"],
        "seed": ["0"],
        "encoder": ["some/vit"],
        "language model": ["some/llm"],
        "training data": ["photos"],
        "data fingerprint": [FINGERPRINT[:16]],
        "trained on": ["8,000 captions"],
        "held out": ["512 captions"],
        "unusable samples": ["3"],
        "steps x batch": ["stage1: 20 x 64, stage2: 20 x 64"],
        "precision": ["auto"],
        "hive-vision": ["0.1.0"],
        "versions": ["python 3.11.7, torch 2.15.0"],
        "hardware": ["NVIDIA X, threads: 8"],
        "system": ["Linux"],
        "what it left": [f"{tmp_path}/hive/encoder"],
    }


def test_facts_of_a_fine_tuning_run(tmp_path: Path) -> None:
    (facts,) = setup(finetune_run(tmp_path / "vlm")).values()
    assert facts["method"] == ["vlm"]
    assert facts["training data"] == ["captions.json, chat.json"]
    assert facts["trained on"] == ["40 conversations in stage1, 60 conversations in stage2"]
    assert facts["unusable samples"] == ["2"]
    assert "held out" not in facts, "what nobody wrote down is not there"


def test_an_unfinished_run_left_nothing(tmp_path: Path) -> None:
    (facts,) = setup(pretrain_run(tmp_path / "hive", finished=False)).values()
    assert facts["state"] == ["not finished: stage2, step 10 of 20"]
    assert "what it left" not in facts
    assert facts["data fingerprint"] == [FINGERPRINT[:16]], "from the model of its first stage"


def test_several_runs_are_columns_where_they_differ(tmp_path: Path) -> None:
    found = setup(
        pretrain_run(tmp_path / "base", "base"), pretrain_run(tmp_path / "hive", micro_batch_size=8)
    )
    differs, same, recipes = found.values()
    assert list(found) == ["What differs", "What is the same for all", "Where the recipes differ"]
    assert differs["method"] == ["base", "hive"]
    assert differs["steps x batch"][0] == "none: the encoder as it came"
    assert same["encoder"] == ["some/vit"]
    assert recipes == {"micro_batch_size": ["-", "8"]}


def test_runs_of_a_series_are_one_column(tmp_path: Path) -> None:
    runs = [read_run(pretrain_run(tmp_path / f"hive-{n}", seed=n), f"hive-{n}") for n in (3, 4)]
    (facts,) = tables(setup_section([Series("hive", runs)])).values()
    assert facts["seed"] == ["3, 4"]
    assert facts["encoder"] == ["some/vit"]


def test_the_whole_recipe(tmp_path: Path) -> None:
    folders = (pretrain_run(tmp_path / "sa", "sa", seed=1), pretrain_run(tmp_path / "hive"))
    (keys,) = tables(recipe_section([one(folder) for folder in folders])).values()
    assert keys["stage1.rules.projectors"] == ["0.002"]
    assert keys["data.num_workers"] == ["0"]
    assert not keys.keys() & {"output", "seed", "method"}
    (alone,) = tables(recipe_section([one(folders[0])])).values()
    assert alone == keys


def test_values_are_written_as_in_the_recipe(tmp_path: Path) -> None:
    folder = pretrain_run(tmp_path / "x", flag=True, nothing=None, rates=[0.9, None])
    (keys,) = tables(recipe_section([one(folder)])).values()
    assert (keys["flag"], keys["nothing"], keys["rates"]) == (["true"], ["null"], ["[0.9, null]"])
