"""Known bad samples are left out: whole images or single captions, of the right data only."""

import json
from pathlib import Path

import pytest

from hive_vision.data.quarantine import read_quarantine, usable_pairs, write_quarantine
from tests.data.helpers import in_memory, one_line


def line(row: int, caption: int | None = None, source: str = "memory") -> dict:
    return {"source": source, "row": row, "image": "x", "caption": caption, "reason": "bad"}


def test_images_and_captions(tmp_path: Path) -> None:
    source = in_memory([None] * 5, [["a", "b"], ["c"], ["d", "e", "f"], ["g"], ["h", "i"]])
    path = tmp_path / "quarantine.jsonl"
    lines = [line(0), line(2, 1), line(4, 0), line(3, source="another")]
    write_quarantine(path, "abc", 9, lines)
    quarantine = read_quarantine(path, "abc")
    kept = [t for t, ok in zip("abcdefghi", usable_pairs(source, quarantine), strict=True) if ok]
    assert "".join(kept) == "cdfgi"
    # Rows are those of the whole source, whatever part of it is looked at.
    part = source.select_images([4, 2, 1])
    usable = usable_pairs(part, quarantine)
    kept = [text for text, ok in zip(part.pairs["caption"], usable, strict=True) if ok]
    assert "".join(kept) == "idfc"
    assert usable_pairs(source, {}).all()


def test_other_data(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    write_quarantine(path, "abc", 9, [])
    with pytest.raises(ValueError, match="is about other data") as failure:
        read_quarantine(path, "abd")
    assert "data verify" in one_line(failure)


@pytest.mark.parametrize("content", ["", "{}\n", "[]", "{", '{"fingerprint": "abc"}\n{"row": 1}\n'])
def test_damaged(tmp_path: Path, content: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is damaged") as failure:
        read_quarantine(path, "abc")
    one_line(failure)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file") as failure:
        read_quarantine(tmp_path / "nothing.jsonl", "abc")
    one_line(failure)


def test_the_format(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    write_quarantine(path, "abc", 9, [line(3)])
    first, second = (json.loads(text) for text in path.read_text().splitlines())
    assert (first["fingerprint"], first["samples"]) == ("abc", 9)
    assert second == line(3)
