"""Stored images: read by row, decoded to RGB, and one line for what cannot be decoded."""

import io
import pickle
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hive_vision.data.images import (
    ColumnImages,
    StoredImage,
    UnusableImageError,
    decode_image,
    read_image,
)
from tests.data.helpers import encoded, first_pixel, good, one_line, picture, write_images


def truncated(image_format: str) -> bytes:
    content = encoded(picture(9), image_format)
    return content[: len(content) // 2]


UNREADABLE = {
    "garbage": StoredImage(bytes=b"this is no image", path=None),
    "no bytes": StoredImage(bytes=b"", path=None),
    "truncated PNG": StoredImage(bytes=truncated("PNG"), path=None),
    "truncated JPEG": StoredImage(bytes=truncated("JPEG"), path=None),
    "missing file": StoredImage(bytes=None, path="/nowhere/at/all.png"),
    "nothing": StoredImage(bytes=None, path=None),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable(kind: str) -> None:
    with pytest.raises(UnusableImageError) as failure:
        decode_image(UNREADABLE[kind])
    one_line(failure)


def huge() -> bytes:
    """A small PNG that says that it is 60,000 pixels wide and high."""
    content = bytearray(encoded(picture(9), "PNG"))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it does not exist"),
        (b"no image", "cannot identify image"),
        (truncated("PNG"), "image file is truncated"),
        (huge(), r"Image size \(3600000000 pixels\) exceeds limit"),
    ],
)
def test_what_somebody_asked_for_is_named(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        UnusableImageError, match=rf"image 'mine' cannot be read: {reason}"
    ) as failure:
        read_image(StoredImage(path=str(file), bytes=None), "mine")
    assert "Error" not in one_line(failure)
    if content is not None:
        with pytest.raises(UnusableImageError, match=reason):
            read_image(StoredImage(path="inside.png", bytes=content), "mine")
    with pytest.raises(UnusableImageError, match="'mine' cannot be read: it is a folder; give"):
        read_image(StoredImage(path=str(tmp_path), bytes=None), "mine")
    with pytest.raises(UnusableImageError, match="'mine' cannot be read: no image; give"):
        read_image(StoredImage(path=None, bytes=None), "mine")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_image_is_rgb(mode: str) -> None:
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        image = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16))
    else:
        image = picture(0).convert(mode)
    content = encoded(image, image_format)
    assert Image.open(io.BytesIO(content)).mode == mode
    decoded = decode_image(StoredImage(path=None, bytes=content))
    assert (decoded.mode, decoded.size) == ("RGB", (16, 16))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled(dtype: type) -> None:
    """Pillow alone makes everything above 255 white."""
    pixels = np.linspace(0, 65535, 256).reshape(16, 16).astype(dtype)
    content = encoded(Image.fromarray(pixels), "TIFF")
    decoded = np.asarray(decode_image(StoredImage(path=None, bytes=content)))
    assert (decoded == (pixels // 256)[..., None]).all()


@pytest.mark.parametrize(
    ("dtype", "highest"),
    [(np.int32, 255), (np.int32, 65535), (np.float32, 1.0), (np.float32, 255.0)],
)
def test_other_numbers_are_scaled_by_their_range(dtype: type, highest: float) -> None:
    """Scans and maps come as whole numbers or fractions; none of them is black."""
    pixels = np.linspace(0, highest, 256).reshape(16, 16).astype(dtype)
    content = encoded(Image.fromarray(pixels), "TIFF")
    decoded = np.asarray(decode_image(StoredImage(path=None, bytes=content)))[..., 0]
    np.testing.assert_allclose(decoded, np.arange(256).reshape(16, 16), atol=1)
    assert decoded.max() == 255


def test_photographs_stand_upright() -> None:
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert decode_image(StoredImage(path=None, bytes=file.getvalue())).size == (10, 20)


@pytest.mark.parametrize("form", ["embedded", "struct with paths", "paths", "bytes"])
def test_columns_of_images(tmp_path: Path, form: str) -> None:
    names = write_images(tmp_path / "images", 5)
    stored = [(tmp_path / "images" / name).read_bytes() for name in names]
    column = {
        "embedded": [{"bytes": b, "path": n} for b, n in zip(stored, names, strict=True)],
        "struct with paths": [{"bytes": None, "path": name} for name in names],
        "paths": names,
        "bytes": stored,
    }[form]
    data = datasets.Dataset.from_dict({"image": column})
    data.save_to_disk(tmp_path / "data")
    images = ColumnImages(
        datasets.load_from_disk(tmp_path / "data"), "image", str(tmp_path / "images")
    )
    for one in (images, pickle.loads(pickle.dumps(images))):
        assert len(one) == 5
        assert [first_pixel(decode_image(one.read(row))) for row in range(5)] == list(range(5))
        named = [f"row {row}" for row in range(5)] if form == "bytes" else names
        assert [one.name(row) for row in range(5)] == named


def test_names_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    column = [{"bytes": None, "path": str(tmp_path / "x" / f"{i}.png")} for i in range(3)]
    data = datasets.Dataset.from_dict({"image": column})
    images = ColumnImages(data, "image", str(tmp_path / "x"))
    assert images.name(2) == "2.png"
    assert images.facts()[0].to_pylist() == ["0.png", "1.png", "2.png"]
    elsewhere = ColumnImages(data, "image", str(tmp_path / "y"))
    assert elsewhere.name(2) == str(tmp_path / "x" / "2.png")


def test_a_missing_image_is_no_error_until_it_is_decoded() -> None:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict({"image": [good(0), None]}, features=features)
    images = ColumnImages(data, "image", "")
    assert images.name(1) == "row 1"
    with pytest.raises(UnusableImageError, match="no image"):
        decode_image(images.read(1))
