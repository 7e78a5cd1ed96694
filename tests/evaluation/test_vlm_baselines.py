"""Baselines on the miniature's benchmarks, against scores counted by hand."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from hive_vision.data.miniature import MiniatureData, build_miniature_data, build_vlm_data
from hive_vision.evaluation.vlm_baselines import (
    COPIES,
    _vqa_accuracy,
    blind_copies,
    majority_answers,
)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    sizes = MiniatureData(
        train_scenes=4, validation_scenes=80, classification_train=16, classification_test=16
    )
    build_miniature_data(folder / "data", sizes)
    build_vlm_data(folder / "data", folder / "vlm", questions=40)
    return folder / "vlm" / "benchmarks"


def table(copies: Path, name: str) -> list[dict]:
    rows: list[dict] = pq.read_table(next((copies / "lmms-lab-encoder").glob(name))).to_pylist()
    return rows


class TestMajority:
    def test_of_all_four(self, copies: Path) -> None:
        found = majority_answers(copies, [*COPIES, "pope"])
        assert list(found) == list(COPIES)
        for result in found.values():
            assert result.score == pytest.approx(result.highest * result.samples.mean())

    def test_mme_gives_half_of_accuracy_and_none_of_the_rest(self, copies: Path) -> None:
        (mme,) = majority_answers(copies, ["mme"]).values()
        assert (mme.score, mme.highest) == (4 * 50, 4 * 200)

    def test_gqa(self, copies: Path) -> None:
        rows = table(copies, "GQA/*instructions*.parquet")
        answer, count = Counter(row["answer"] for row in rows).most_common(1)[0]
        (gqa,) = majority_answers(copies, ["gqa"]).values()
        assert gqa.score == pytest.approx(100 * count / len(rows))
        assert set(gqa.answers) == {answer}

    def test_ok_vqa_counts_three_other_annotators(self, copies: Path) -> None:
        rows = table(copies, "OK-VQA/*.parquet")

        def score(answer: str) -> float:
            total = 0.0
            for row in rows:
                for place in range(10):
                    others = [*row["answers"][:place], *row["answers"][place + 1 :]]
                    total += min(1, others.count(answer) / 3)
            return 100 * total / 10 / len(rows)

        (found,) = majority_answers(copies, ["ok_vqa_val2014"]).values()
        best = max({answer for row in rows for answer in row["answers"]}, key=score)
        assert found.score == pytest.approx(score(best))

    def test_science_qa(self, copies: Path) -> None:
        rows = table(copies, "ScienceQA/*.parquet")
        count = Counter(row["answer"] for row in rows).most_common(1)[0][1]
        (found,) = majority_answers(copies, ["scienceqa_img"]).values()
        assert found.score == pytest.approx(100 * count / len(rows))

    def test_copies_that_are_not_there(self, tmp_path: Path) -> None:
        assert majority_answers(tmp_path, ["mme", "gqa"]) == {}

    @pytest.mark.parametrize(("said", "share"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
    def test_an_annotator_does_not_confirm_himself(self, said: int, share: float) -> None:
        """The published values of VQA accuracy for so many of ten."""
        given = ["red"] * said + ["blue"] * (10 - said)
        assert _vqa_accuracy("red", given) == pytest.approx(share)


class TestBlind:
    def test_only_the_images_differ(self, copies: Path, tmp_path: Path) -> None:
        blind = blind_copies(copies, tmp_path / "blind")
        files = [path for path in copies.rglob("*") if path.is_file()]
        assert len(files) == 9
        for path in files:
            other = blind / path.relative_to(copies)
            if path.suffix != ".parquet":
                assert other.read_bytes() == path.read_bytes()
                continue
            before, after = pq.read_table(path), pq.read_table(other)
            assert before.schema.equals(after.schema, check_metadata=True)
            names = [name for name in before.column_names if name != "image"]
            assert before.select(names).equals(after.select(names))
        folder = str(blind / "lmms-lab-encoder" / "MME")
        seen = datasets.load_dataset(folder, split="test", cache_dir=str(tmp_path / "cache"))
        assert {np.asarray(image).tobytes() for image in seen["image"]} == {
            np.full((48, 48, 3), 128, np.uint8).tobytes()
        }

    def test_once(self, copies: Path, tmp_path: Path) -> None:
        blind = blind_copies(copies, tmp_path / "blind")
        before = {path: path.stat().st_mtime_ns for path in blind.rglob("*")}
        blind_copies(copies, tmp_path / "blind")
        assert {path: path.stat().st_mtime_ns for path in blind.rglob("*")} == before
