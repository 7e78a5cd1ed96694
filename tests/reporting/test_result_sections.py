"""Tables, figures and sentences of results, from the files that the commands write."""

import json
from pathlib import Path
from typing import Any

import pytest

from hive_vision.reporting.report import Gallery, Paragraph, Points, TitledTable
from hive_vision.reporting.result_sections import (
    Found,
    figures_section,
    probe_section,
    vlm_section,
)
from tests.reporting.run_folders import (
    evaluate_folder,
    maps_folder,
    png,
    probe_result,
    probes,
    study_folder,
)


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def tables(found: Found) -> dict[str, TitledTable]:
    return {block.title: block for block in found.section.blocks if isinstance(block, TitledTable)}


def bold(table: TitledTable) -> list[str]:
    return [cell.text for row in table.grid.rows for cell in row if cell.bold]


class TestProbes:
    def test_tables_and_verdicts(self) -> None:
        found = probe_section(probes(base=0.5, sa=0.505, hive=0.9), "Probes", 2)
        accuracies, differences = tables(found).values()
        assert list(accuracies.grid.headings) == ["accuracy, %", "base", "sa", "hive"]
        assert [row[0].text for row in accuracies.grid.rows] == ["texture", "digit"]
        (best,) = bold(accuracies)
        assert best.startswith(("89", "90", "91"))
        assert list(differences.grid.headings) == ["points", "texture", "digit"]
        assert [r[0].text for r in differences.grid.rows] == [
            "sa - base",
            "hive - base",
            "hive - sa",
        ]
        assert len(bold(differences)) == 2
        said = "\n".join(found.verdicts)
        points = differences.grid.rows[1][1].text.partition(" ")[0].removeprefix("+")
        assert f"hive is better than base by {points} points" in said
        assert "hive on texture; on the other set no method" in said
        assert "digit: no difference can be told between any two" in said
        assert "2 training runs of each method" in said

    @pytest.mark.parametrize(
        ("seeds", "words"), [(1, "not the methods"), (None, "is not in these results")]
    )
    def test_one_seed_is_said(self, seeds: int | None, words: str) -> None:
        found = probe_section(probes(base=0.5, hive=0.9), "Probes", seeds)
        assert words in found.verdicts[-1]
        assert "and the 2 seeds of the heads" in found.verdicts[-1]
        no_heads = probe_section(probes(seeds=1, base=0.5, hive=0.9), "Probes", seeds)
        assert "heads" not in no_heads.verdicts[-1]

    def test_one_encoder_is_compared_with_nothing(self) -> None:
        found = probe_section(probes(hive=0.9), "Probes", None)
        assert list(tables(found)) == ["Accuracy"]
        assert found.verdicts == []
        assert "old" not in tables(found)["Accuracy"].note

    def test_what_a_head_is(self) -> None:
        content = probes(hive=0.9)
        assert "the head, is trained" in str(probe_section(content, "Probes", 1).section.blocks)
        for result in content["results"]["hive"].values():
            result["settings"] = {"probe": "zero_shot", "templates": "clip"}
        assert "the head, is trained" not in str(probe_section(content, "Probes", 1).section)

    def test_layers_and_search_of_a_study(self, tmp_path: Path) -> None:
        found = probe_section(read(study_folder(tmp_path / "study")), "Probes", 2)
        assert "Accuracy of each layer: texture" in tables(found)
        assert bold(tables(found)["Search"]) == ["70.0"]
        (gallery,) = [block for block in found.section.blocks if isinstance(block, Gallery)]
        (picture,) = gallery.pictures
        assert picture.png.startswith(b"\x89PNG")
        assert "hive highest in layer 2" in picture.alt
        content = read(tmp_path / "study")
        del content["layers"]["texture"]["hive"]
        (gallery,) = [
            block
            for block in probe_section(content, "Probes", 2).section.blocks
            if isinstance(block, Gallery)
        ]
        assert gallery.pictures[0].png != picture.png, "each method has its line"

    def test_between_two_encoders(self) -> None:
        kinds = {"linear": [probe_result(0.5).to_json(), probe_result(0.6).to_json()]}
        content = {"alphas": [0.0, 1.0], "interpolation": {"texture": kinds}}
        found = probe_section(content, "Probes", None)
        (table,) = tables(found).values()
        assert [row[0].text for row in table.grid.rows] == ["0", "1"]


class TestVlm:
    def test_scores_and_verdicts(self, tmp_path: Path) -> None:
        shares = {"base": (0.3, 0.32), "hive": (0.8, 0.82)}
        found = vlm_section(read(evaluate_folder(tmp_path / "e", **shares)), "VLM benchmarks")
        scores, differences = tables(found).values()
        assert [row[0].text for row in scores.grid.rows] == ["gqa (of 100)", "mme (of 800)"]
        assert scores.grid.rows[0][1].text == "31.0 ±1.4"
        assert "Means over 2 runs" in scores.note
        assert "Bold: better than every other one" in scores.note
        assert "grey" not in scores.note, "there are no baselines"
        assert bold(scores) == ["81.0 ±1.4", "648.0 ±11.3"]
        assert len(bold(differences)) == 2
        assert "2 runs of each model" in found.verdicts[-1]
        assert any("gqa: hive is better than base by 50.0 points" in s for s in found.verdicts)

    def test_close_scores_are_not_told_apart(self, tmp_path: Path) -> None:
        folder = evaluate_folder(tmp_path / "e", base=(0.5,), hive=(0.51,))
        # The same questions right, and a few more: seen in pairs that would be certain.
        content = read(folder)
        for found in content["differences"].values():
            found[0] |= {"low": -1.0}
        shown = vlm_section(content, "VLM benchmarks")
        assert bold(tables(shown)["Scores"]) == []
        assert "gqa and mme: no difference can be told between base and hive." in shown.verdicts
        assert "Nothing is bold" in tables(shown)["Scores"].note
        assert "One run of each model" in shown.verdicts[-1]

    def test_baselines_are_to_be_beaten(self, tmp_path: Path) -> None:
        shares = {"majority": (0.2,), "blind hive": (0.3,), "blind base": (0.3,)}
        folder = evaluate_folder(tmp_path / "e", **shares, base=(0.5,), hive=(0.8,))
        found = vlm_section(read(folder), "VLM benchmarks")
        assert bold(tables(found)["Scores"]) == ["80.0", "640.0"], "the blind are no rivals"
        assert "with grey images" in tables(found)["Scores"].note
        assert any("than blind hive by" in sentence for sentence in found.verdicts)

    def test_one_model(self, tmp_path: Path) -> None:
        found = vlm_section(read(evaluate_folder(tmp_path / "e", hive=(0.8,))), "VLM benchmarks")
        assert list(tables(found)) == ["Scores"]
        assert "old" not in tables(found)["Scores"].note
        assert "Means" not in tables(found)["Scores"].note
        assert found.verdicts == []

    def test_other_numbers_of_runs_are_not_compared(self, tmp_path: Path) -> None:
        folder = evaluate_folder(tmp_path / "e", base=(0.5,), hive=(0.8, 0.9))
        assert vlm_section(read(folder), "VLM benchmarks").verdicts == []


class TestFigures:
    def test_maps_in_their_order(self, tmp_path: Path) -> None:
        folder = maps_folder(tmp_path / "maps")
        section = figures_section(read(folder), folder, "Maps").section
        models, points, gallery, table = section.blocks
        assert models == Paragraph("Models: sa and hive.")
        assert isinstance(gallery, Gallery)
        assert gallery.pictures[0].png == png()
        assert gallery.pictures[0].alt == "Gradients. Bright is large."
        assert isinstance(table, TitledTable)
        assert bold(table) == ["0.4"]
        assert isinstance(points, Points)
        assert points.items == ["In hive, early layers get more gradient than in sa."]

    @pytest.mark.parametrize("file", ["gone.png", "../results.json", "/etc/hostname"])
    def test_a_figure_that_is_not_in_the_folder(self, tmp_path: Path, file: str) -> None:
        folder = maps_folder(tmp_path / "deep" / "maps")
        (folder.parent / "results.json").touch()
        content = read(folder)
        content["figures"][0]["file"] = file
        with pytest.raises(ValueError, match="which is not in the folder"):
            figures_section(content, folder, "Maps")

    def test_a_figure_that_is_no_png(self, tmp_path: Path) -> None:
        folder = maps_folder(tmp_path / "maps")
        (folder / "gradients-0.png").write_bytes(b"<svg/>")
        with pytest.raises(ValueError, match="is no PNG"):
            figures_section(read(folder), folder, "Maps")
