"""Tar shards: every image is found where it lies, in any process, with few open files."""

import os
import pickle
import tarfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from hive_vision.data import shards as shards_module
from hive_vision.data.shards import ShardImages, find_shards, index_shards
from tests.data.helpers import encoded, one_line, picture, words, write_shard, write_shards


def images_of(folder: Path) -> ShardImages:
    shards = find_shards(str(folder))["train"]
    return ShardImages(index_shards(shards), shards)


CAPTIONS = [words(index) for index in range(12)]


@pytest.mark.parametrize("form", ["txt", "json"])
def test_index(tmp_path: Path, form: str) -> None:
    index = index_shards(find_shards(str(write_shards(tmp_path, CAPTIONS, form=form)))["train"])
    assert index["shard"] == [0] * 5 + [1] * 5 + [2] * 2
    assert index["name"] == [f"{number:03}.png" for number in range(12)]
    assert index["caption"] == [[caption] for caption in CAPTIONS]


def test_bytes_are_those_in_the_archive(tmp_path: Path) -> None:
    images = images_of(write_shards(tmp_path, CAPTIONS))
    for row in (3, 11, 0, 7, 3):
        assert images.read(row)["bytes"] == encoded(picture(row))
        assert images.name(row) == f"{row:03}.png"
        assert images.read(row)["path"].endswith(f"part-0000{row // 5}.tar/{row:03}.png")
    assert images.shards.tolist() == [0] * 5 + [1] * 5 + [2] * 2


def test_after_a_fork(tmp_path: Path) -> None:
    images = images_of(write_shards(tmp_path, CAPTIONS))
    images.read(0)  # open files must survive
    with get_context("fork").Pool(2) as pool:
        found = pool.map(images.read, list(range(12)) * 3, chunksize=1)
    assert [one["bytes"] for one in found] == [encoded(picture(row)) for row in range(12)] * 3


def test_pickles_small(tmp_path: Path) -> None:
    images = images_of(write_shards(tmp_path, CAPTIONS))
    images.read(0)
    copy = pickle.loads(pickle.dumps(images))
    assert copy.read(11) == images.read(11)


def test_few_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 3)
    images = images_of(write_shards(tmp_path, CAPTIONS, per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for row in (*range(12), *range(12)):
        assert images.read(row)["bytes"] == encoded(picture(row))
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_members_in_any_order_and_other_files(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "x.tar",
        [
            ("dir/a.cls", b"3"),
            ("dir/a.txt", b" first \n"),
            ("dir/a.JPG", b"one"),
            ("dir/b.png", b"two"),  # no caption
            ("dir/c.txt", b"no image"),
            ("dir/d.json", b'{"caption": "last"}'),
            ("dir/d.seg.png", b"not the image"),
            ("dir/d.webp", b"three"),
        ],
    )
    index = index_shards([shard])
    assert index["name"] == ["dir/a.JPG", "dir/b.png", "dir/d.webp"]
    assert index["caption"] == [["first"], [""], ["last"]]
    images = ShardImages(index, [shard])
    assert [images.read(row)["bytes"] for row in range(3)] == [b"one", b"two", b"three"]


def test_folders_of_splits_and_patterns(tmp_path: Path) -> None:
    write_shards(tmp_path / "all" / "train", CAPTIONS[:10])
    write_shards(tmp_path / "all" / "validation", CAPTIONS[:3])
    found = find_shards(str(tmp_path / "all"))
    assert {split: len(shards) for split, shards in found.items()} == {"train": 2, "validation": 1}
    one = found["train"][1]
    assert find_shards(str(one)) == {"train": [one]}
    pattern = str(tmp_path / "all" / "train" / "part-{00000..00001}.tar")
    assert find_shards(pattern) == {"train": found["train"]}
    with pytest.raises(ValueError, match="names 4 shards, 2 of them are missing") as failure:
        find_shards(pattern.replace("00001}", "00003}"))
    assert "part-00002.tar" in one_line(failure)
    assert find_shards(str(tmp_path)) == {}


def test_a_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", [("a.png", b"1"), ("a.txt", b"one")])
    assert index_shards([shard])["caption"] == [["one"]]
    write_shard(shard, [("a.png", b"1"), ("a.txt", b"two")])
    os.utime(shard, ns=(1, 1))
    assert index_shards([shard])["caption"] == [["two"]]


def test_broken_shards(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, CAPTIONS[:5]) / "part-00000.tar"
    with pytest.raises(ValueError, match="no 'text'; its keys are caption: set caption") as failure:
        index_shards([shard], "text")
    assert str(shard) in one_line(failure)
    empty = write_shard(tmp_path / "empty.tar", [("readme.md", b"hello")])
    with pytest.raises(ValueError, match="no samples in") as failure:
        index_shards([empty])
    one_line(failure)
    content = shard.read_bytes()
    shard.write_bytes(b"x" * 512 + content[512:])
    with pytest.raises(ValueError, match="cannot be read as a shard") as failure:
        index_shards([shard])
    one_line(failure)
    compressed = tmp_path / "packed.tar"
    with tarfile.open(compressed, "w:gz") as archive:
        archive.add(shard, "a.png")
    with pytest.raises(ValueError, match="cannot be read as a shard") as failure:
        index_shards([compressed])
    one_line(failure)
