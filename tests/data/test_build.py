"""Built data: the same pairs and pixels as the source, the same bytes however it was made."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hive_vision.data.build import BuildSettings, build_data
from hive_vision.data.images import decode_image
from hive_vision.data.sources import CaptionSource, Source, open_source
from hive_vision.folders import check_folder, partial_folder
from tests.conftest import write_image_folder

FORMATS = ("tar", "arrow", "parquet")
Pair = tuple[bytes, list[str]]


def opened(folder: Path | str, **options: object) -> CaptionSource:
    return open_source(Source(path=str(folder), **options))["train"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored_pairs(source: CaptionSource) -> list[Pair]:
    """Encoded bytes and captions of every image."""
    pairs = []
    for row in range(len(source)):
        stored = source.read_image(row)
        image = stored["bytes"] or Path(stored["path"]).read_bytes()
        pairs.append((image, source.captions_of(row)))
    return pairs


def read_with_libraries(folder: Path, to: str) -> list[Pair]:
    """What others read: the datasets library, or tarfile with the WebDataset convention."""
    if to == "tar":
        pairs = []
        for shard in sorted(folder.glob("*.tar")):
            with tarfile.open(shard) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}
            for key in dict.fromkeys(name.partition(".")[0] for name in files):
                (image,) = (files[n] for n in files if n.startswith(key) and "json" not in n)
                pairs.append((image, json.loads(files[f"{key}.json"])["caption"]))
        return pairs
    if to == "arrow":
        data = datasets.load_from_disk(str(folder))
    else:
        data = datasets.load_dataset(str(folder))["train"]
    assert isinstance(data.features["image"], datasets.Image)
    data = data.cast_column("image", datasets.Image(decode=False))
    return [(row["image"]["bytes"], row["caption"]) for row in data]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several formats, one damaged, one missing caption, two sizes."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    write_image_folder(folder, 12)
    random = np.random.default_rng(3)
    big = Image.fromarray(random.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    big.save(folder / "big.jpg")
    big.resize((20, 70)).save(folder / "tall.webp")
    big.convert("P").save(folder / "other.gif")
    (folder / "damaged.png").write_bytes((folder / "000.png").read_bytes()[:200])
    names = ["big.jpg", "tall.webp", "other.gif", "damaged.png"]
    with (folder / "metadata.jsonl").open("a") as file:
        for name in names:
            file.write(json.dumps({"file_name": name, "caption": f"a ünusual {name}"}) + "\n")
    return folder


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("reader", ["ours", "others"])
def test_same_captions_and_bytes(photos: Path, tmp_path: Path, to: str, reader: str) -> None:
    source, output = opened(photos), tmp_path / "built"
    manifest = build_data(source, output, BuildSettings(to=to, shard_size=5, workers=1))
    expected, left_out = {}, []
    for row in range(len(source)):
        name = source.image_name(row)
        if name == "damaged.png":
            left_out.append(name)
        else:
            expected[name] = (stored_pairs(source)[row], decode_image(source.read_image(row)))
    found = stored_pairs(opened(output)) if reader == "ours" else read_with_libraries(output, to)
    assert len(found) == len(expected) == manifest["images"] == manifest["captions"] == 15
    assert manifest["unusable"] == len(left_out) == 1
    for (image, captions), (name, ((original, texts), pixels)) in zip(
        found, expected.items(), strict=True
    ):
        assert captions == texts
        if name != "other.gif":  # no reader of shards knows it: stored as PNG
            assert image == original
        decoded = decode_image({"path": None, "bytes": image})
        assert np.array_equal(np.asarray(decoded), np.asarray(pixels))


@pytest.mark.parametrize("to", FORMATS)
def test_several_captions_stay_with_their_image(tmp_path: Path, to: str) -> None:
    """COCO with one, two and no captions; built again from what was built."""
    write_image_folder(tmp_path / "images", 3)
    texts = [(1, "ein süßer Hund"), (0, "a"), (1, ""), (1, "\N{DOG FACE}\nb")]
    coco = {
        "images": [{"id": n, "file_name": f"{n:03}.png"} for n in range(3)],
        "annotations": [{"image_id": image, "caption": text} for image, text in texts],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    source = opened(tmp_path / "coco.json", images=str(tmp_path / "images"))
    settings = BuildSettings(to=to, workers=1)
    manifest = build_data(source, tmp_path / "once", settings)
    once = opened(tmp_path / "once")
    assert (manifest["images"], manifest["captions"]) == (len(once), len(once.captions)) == (2, 4)
    assert once.fingerprint == manifest["fingerprint"]
    assert [captions for _, captions in stored_pairs(once)] == [
        ["a"],
        ["ein süßer Hund", "", "\N{DOG FACE}\nb"],
    ]
    build_data(once, tmp_path / "twice", settings)
    assert stored_pairs(opened(tmp_path / "twice")) == stored_pairs(once)


def test_what_is_left_out_is_named(photos: Path, tmp_path: Path) -> None:
    build_data(opened(photos), tmp_path / "built", BuildSettings(shard_size=5, workers=1))
    heading, line = (tmp_path / "built" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(heading) == {"fingerprint": opened(photos).fingerprint, "samples": 16}
    entry = json.loads(line)
    assert (entry["image"], entry["caption"]) == ("damaged.png", None)
    assert opened(photos).image_name(entry["row"]) == "damaged.png"
    assert "truncated" in entry["reason"] or "cannot" in entry["reason"]


def test_index_says_where_each_image_lies(photos: Path, tmp_path: Path) -> None:
    build_data(opened(photos), tmp_path / "built", BuildSettings(shard_size=5, workers=1))
    index = datasets.Dataset.from_file(str(tmp_path / "built" / "index.arrow"))
    shards = sorted((tmp_path / "built").glob("*.tar"))
    found = []
    for entry in index:
        with shards[entry["shard"]].open("rb") as file:
            file.seek(entry["offset"])
            found.append((file.read(entry["size"]), entry["caption"]))
    assert found == read_with_libraries(tmp_path / "built", "tar")
    assert index["name"][12] == "big.jpg"


@pytest.mark.parametrize("to", FORMATS)
def test_same_bytes_for_any_number_of_workers(photos: Path, tmp_path: Path, to: str) -> None:
    for workers in (1, 2):
        settings = BuildSettings(to=to, resize=24, shard_size=3, workers=workers)
        build_data(opened(photos), tmp_path / str(workers), settings)
        assert content(tmp_path / str(workers)) == content(tmp_path / "1")
    check_folder(tmp_path / "1", "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"], "something is left over"


def test_fingerprint_follows_the_content(photos: Path, tmp_path: Path) -> None:
    def built(name: str, **options: object) -> str:
        settings = BuildSettings(shard_size=5, workers=1, **options)
        return build_data(opened(photos), tmp_path / name, settings)["fingerprint"]

    assert built("a") == built("b") != built("c", resize=16)


def test_resize_sets_the_shorter_side_and_never_enlarges(photos: Path, tmp_path: Path) -> None:
    settings = BuildSettings(resize=30, shard_size=100, workers=1)
    build_data(opened(photos), tmp_path / "built", settings)
    before = {tuple(c): b for b, c in stored_pairs(opened(photos))}
    sizes = {}
    for image, captions in read_with_libraries(tmp_path / "built", "tar"):
        with Image.open(io.BytesIO(image)) as decoded:
            sizes[captions[0].rpartition(" ")[2]] = (decoded.size, decoded.format)
        if "tall" in captions[0]:  # 20 x 70 is small enough
            assert image == before[tuple(captions)]
    assert sizes["big.jpg"] == ((45, 30), "JPEG")
    assert sizes["tall.webp"] == ((20, 70), "WEBP")
    assert sizes["other.gif"] == ((45, 30), "PNG")


class TestInterruption:
    def test_killed_and_started_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """kill -9 once shards exist: what is finished stays, the end is as if undisturbed."""
        photos = write_image_folder(tmp_path / "photos", 60)
        command = [sys.executable, "-m", "hive_vision", "data", "build", str(photos)]
        command += [str(tmp_path / "built"), "shard_size=1", "workers=2"]
        aside = partial_folder(tmp_path / "built")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while len(list(aside.glob("*.tar"))) < 5:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "built").exists()
        time.sleep(0.5)  # its workers notice
        records = tmp_path / ".built.records"
        finished = {json.loads(p.read_text())["file"] for p in records.glob("0*.json")}
        assert 4 <= len(finished) < 60
        before = {name: os.stat(aside / name).st_ino for name in finished}
        caplog.set_level(logging.INFO, "hive_vision")
        settings = BuildSettings(shard_size=1, workers=1)
        build_data(opened(photos), tmp_path / "built", settings)
        assert f"{len(finished)} of 60 shards are already written" in caplog.text
        assert before == {name: os.stat(tmp_path / "built" / name).st_ino for name in finished}
        build_data(opened(photos), tmp_path / "whole", settings)
        assert content(tmp_path / "built") == content(tmp_path / "whole")
        assert not aside.exists()
        assert not records.exists()

    def test_other_settings_are_refused(self, photos: Path, tmp_path: Path) -> None:
        output = tmp_path / "built"
        broken = opened(photos).select_images([15])
        with pytest.raises(ValueError, match="none of the 1 images"):
            build_data(broken, output, BuildSettings(workers=1))
        with pytest.raises(ValueError, match="was begun with resize=null, not resize=8"):
            build_data(broken, output, BuildSettings(workers=1, resize=8))
        with pytest.raises(ValueError, match="was begun from other data"):
            build_data(opened(photos), output, BuildSettings(workers=1))

    def test_one_at_a_time(self, photos: Path, tmp_path: Path) -> None:
        records = tmp_path / ".built.records"
        records.mkdir()
        script = (
            "import pathlib, sys, time\n"
            "from hive_vision.folders import acquire\n"
            f"file = acquire(pathlib.Path({str(records / 'lock')!r}), 'busy')\n"
            "print('locked', flush=True)\n"
            "time.sleep(60)\n"
        )
        settings = BuildSettings(workers=1)
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(ValueError, match="another process is building"):
                build_data(opened(photos), tmp_path / "built", settings)
            other.kill()
        build_data(opened(photos), tmp_path / "built", settings)

    def test_half_a_shard_is_thrown_away(self, photos: Path, tmp_path: Path) -> None:
        settings = BuildSettings(shard_size=4, workers=1)
        (aside := partial_folder(tmp_path / "built")).mkdir()
        (aside / "shard-00000.tar.123.unfinished").write_text("half")
        (aside / "shard-00001.tar").write_text("whole, but nothing says so")
        build_data(opened(photos), tmp_path / "built", settings)
        build_data(opened(photos), tmp_path / "undisturbed", settings)
        assert content(tmp_path / "built") == content(tmp_path / "undisturbed")

    def test_finished_is_not_done_again(self, photos: Path, tmp_path: Path) -> None:
        output, settings = tmp_path / "built", BuildSettings(shard_size=4, workers=1)
        first = build_data(opened(photos), output, settings)
        times = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
        assert build_data(opened(photos), output, settings) == first
        assert times == {p: p.stat().st_mtime_ns for p in output.rglob("*")}
        with pytest.raises(ValueError, match="was built with to=tar, not to=arrow"):
            build_data(opened(photos), output, BuildSettings(to="arrow", shard_size=4))


@pytest.mark.parametrize("key", ["resize", "shard_size", "workers"])
def test_impossible_settings(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is 0; it must be at least 1"):
        BuildSettings(**{key: 0})
