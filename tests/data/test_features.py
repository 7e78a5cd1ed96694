"""Stored features: what is written is read, whatever interrupts it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hive_vision.data import features
from hive_vision.data.features import DistinctImages, FeatureStore
from hive_vision.data.images import UnusableImageError
from hive_vision.data.sources import Source, open_source
from tests.conftest import write_image_folder

SHAPE = (2, 3, 4)


def store_in(
    folder: Path, fingerprint: str = "one", dtype: torch.dtype = torch.float32
) -> FeatureStore:
    return FeatureStore(folder / "features", fingerprint, 5, SHAPE, dtype)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    store, content = store_in(tmp_path, dtype=dtype), rows(5)
    store.append(content[:3], [None] * 3)
    assert not store.is_complete
    store.append(content[3:], [None, "cannot identify image"])
    for one in (store, pickle.loads(pickle.dumps(store)), store_in(tmp_path, dtype=dtype)):
        assert one.is_complete
        for row in range(4):
            assert torch.equal(one.read(row), content[row].to(dtype))
        with pytest.raises(UnusableImageError, match=r"^cannot identify image$"):
            one.read(4)
    assert len(pickle.dumps(store)) < 2000
    size = (tmp_path / "features" / "features.bin").stat().st_size
    assert size == 5 * store.row_bytes == 5 * 24 * dtype.itemsize


def test_what_is_read_may_be_changed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.append(rows(5), [None] * 5)
    store.read(1).zero_()
    assert torch.equal(store.read(1), rows(5)[1])


def test_an_interrupted_pass_goes_on_behind_the_last_whole_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SAVE_SECONDS", 0.0)
    store, content = store_in(tmp_path), rows(5)
    store.append(content[:2], [None, "no image"])
    monkeypatch.setattr(features, "SAVE_SECONDS", 99.0)
    store.append(rows(1, seed=7), [None])  # killed before it is noted, and
    with (tmp_path / "features" / "features.bin").open("ab") as file:
        file.write(b"half a row")
    again = store_in(tmp_path)
    assert again.done == 2
    again.append(content[2:], [None] * 3)
    assert again.is_complete
    whole = store_in(tmp_path)
    assert all(torch.equal(whole.read(row), content[row]) for row in (0, 2, 3, 4))
    with pytest.raises(UnusableImageError):
        whole.read(1)


@pytest.mark.parametrize(
    ("fingerprint", "dtype"), [("other", torch.float32), ("one", torch.bfloat16)]
)
def test_other_features_are_not_used(
    fingerprint: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SAVE_SECONDS", 0.0)
    store_in(tmp_path).append(rows(2), [None] * 2)
    monkeypatch.setattr(features, "SAVE_SECONDS", 99.0)
    other = store_in(tmp_path, fingerprint, dtype)
    assert other.done == 0
    other.append(rows(4, seed=1), [None] * 4)  # killed before it is noted
    assert store_in(tmp_path).done == 0
    assert store_in(tmp_path, fingerprint, dtype).done == 0


def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    store_in(tmp_path).append(rows(5), [None] * 5)
    file = tmp_path / "features" / "features.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert store_in(tmp_path).done == 0


def test_what_is_there_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    store = store_in(tmp_path)
    assert store.free_bytes() == 1000
    store.append(rows(1), [None])
    assert store.free_bytes() == 1000 + store.row_bytes


def test_distinct_images_of_several_sources(tmp_path: Path) -> None:
    sources = [
        open_source(Source(str(write_image_folder(tmp_path / name, 6, seed))))["train"]
        for seed, name in enumerate("ab")
    ]
    used = [np.array([4, 1, 4]), np.array([0, 5])]
    images = DistinctImages([source.images for source in sources], used)
    assert len(images) == 4
    places = [(0, 1), (0, 4), (1, 0), (1, 5)]
    for number, (part, row) in enumerate(places):
        assert images.number(part, row) == number
        found = np.asarray(images.decode(number))
        name = sources[part].images.read(row)["path"]
        assert name is not None
        assert np.array_equal(found, np.asarray(Image.open(name).convert("RGB")))
