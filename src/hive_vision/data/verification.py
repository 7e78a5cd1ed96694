"""Every image of a source decoded once: what cannot be used and why, sizes, duplicates."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hive_vision.data.images import StoredImage, UnusableImageError, decode_image, read_bytes
from hive_vision.data.parallel import row_ranges, work_through
from hive_vision.data.sources import CaptionSource

MIN_SIDE = 8  # smaller ones are the placeholders of lost images
EMPTY = "empty caption"
CHUNK = 256  # images that a process takes at once
CAPTION_CHUNK = 10_000


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found in some images.

    Attributes:
        images: How many were looked at.
        captions: How many captions they have.
        usable: How many of these captions can be used, and so can their images.
        sizes: (n, 2) width and height of those that can be decoded.
        image_hashes: (n,) of their encoded bytes.
        pair_hashes: (p,) of image and caption together, for each of their captions.
        problems: What cannot be used, as in a quarantine file.
    """

    images: int
    captions: int
    usable: int
    sizes: NDArray[np.int64]
    image_hashes: NDArray[np.uint64]
    pair_hashes: NDArray[np.uint64]
    problems: list[dict[str, Any]]

    @classmethod
    def join(cls, parts: "Sequence[Inspection]") -> "Inspection":
        """Put what was found in several places together."""
        return cls(
            images=sum(part.images for part in parts),
            captions=sum(part.captions for part in parts),
            usable=sum(part.usable for part in parts),
            sizes=np.concatenate([np.empty((0, 2), np.int64), *(p.sizes for p in parts)]),
            image_hashes=_joined([part.image_hashes for part in parts]),
            pair_hashes=_joined([part.pair_hashes for part in parts]),
            problems=[problem for part in parts for problem in part.problems],
        )


def inspect_source(source: CaptionSource, workers: int, title: str) -> Inspection:
    """Decode all images of a source.

    Args:
        source: Images with their captions.
        workers: Processes.
        title: What is shown beside the progress.
    """
    ranges = row_ranges(len(source), CHUNK)
    return Inspection.join(list(work_through(_Inspector(source), ranges, workers, title)))


def caption_lengths(
    source: CaptionSource, encode: Callable[[Sequence[str]], list[list[int]]], title: str
) -> NDArray[np.int64]:
    """Count the tokens of all captions of a source.

    Args:
        source: Images with their captions.
        encode: Captions to token ids, not cut.
        title: What is shown beside the progress.

    Returns:
        (P,) tokens, start and end included.
    """

    def count(rows: range) -> list[int]:
        texts = source.captions[rows.start : rows.stop].to_pylist()
        return [len(ids) for ids in encode([text or "" for text in texts])]

    ranges = row_ranges(len(source.captions), CAPTION_CHUNK)
    # The tokenizer has threads of its own.
    chunks = work_through(count, ranges, 1, title, unit="captions")
    return np.array([length for chunk in chunks for length in chunk], dtype=np.int64)


def summarise(
    inspection: Inspection, lengths: NDArray[np.int64], max_text_tokens: int
) -> dict[str, Any]:
    """Say in numbers what a part of the data is like.

    Args:
        inspection: What was found.
        lengths: (P,) tokens of each caption.
        max_text_tokens: Where captions are cut.

    Returns:
        Numbers, as JSON: see ``docs/data.md``.
    """
    problems = inspection.problems
    cut = int((lengths > max_text_tokens).sum())
    return {
        "images": inspection.images,
        "captions": inspection.captions,
        "usable_captions": inspection.usable,
        "unusable_images": sum(problem["caption"] is None for problem in problems),
        "empty_captions": sum(problem["caption"] is not None for problem in problems),
        "image_size": _three_sizes(inspection.sizes),
        "caption_tokens": _three_lengths(lengths),
        "max_text_tokens": max_text_tokens,
        "cut_captions": cut,
        "cut_share": cut / max(1, len(lengths)),
        "duplicate_images": _repeated(inspection.image_hashes),
        "duplicate_pairs": _repeated(inspection.pair_hashes),
    }


@dataclass(frozen=True, eq=False)
class _Inspector:
    """Looks at a range of a source's images; called in several processes."""

    source: CaptionSource

    def __call__(self, rows: range) -> Inspection:
        sizes, image_hashes, pair_hashes, problems = [], [], [], []
        captions = usable = 0
        for row in rows:
            texts = self.source.captions_of(row)
            captions += len(texts)
            about = {
                "source": self.source.name,
                "row": int(self.source.rows[row]),
                "image": self.source.image_name(row),
            }
            reason = None if texts else "no caption"
            try:
                content, size = _decode(self.source.read_image(row))
            except UnusableImageError as error:
                reason = str(error)
            else:
                sizes.append(size)
                image_hashes.append(_hash(content))
                pair_hashes += [_hash(content, text) for text in texts]
                if min(size) < MIN_SIDE:
                    reason = f"only {size[0]} x {size[1]} pixels"
            if reason is not None:
                problems.append({**about, "caption": None, "reason": reason})
                continue
            for number, text in enumerate(texts):
                if text.strip():
                    usable += 1
                else:
                    problems.append({**about, "caption": number, "reason": EMPTY})
        return Inspection(
            images=len(rows),
            captions=captions,
            usable=usable,
            sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
            image_hashes=np.array(image_hashes, dtype=np.uint64),
            pair_hashes=np.array(pair_hashes, dtype=np.uint64),
            problems=problems,
        )


def _decode(stored: StoredImage) -> tuple[bytes, tuple[int, int]]:
    content = read_bytes(stored)
    return content, decode_image(StoredImage(path=stored["path"], bytes=content)).size


def _hash(content: bytes, text: str = "") -> int:
    digest = hashlib.blake2b(content, digest_size=8)
    digest.update(text.encode())
    return int.from_bytes(digest.digest(), "little")


def _joined(hashes: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def _repeated(hashes: NDArray[np.uint64]) -> int:
    """How many are there that were there before."""
    return len(hashes) - len(np.unique(hashes))


def _three_sizes(sizes: NDArray[np.int64]) -> dict[str, list[int]] | None:
    """Width and height of the image with the smallest, the median and the largest area."""
    if len(sizes) == 0:
        return None
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    places = {"smallest": 0, "median": (len(order) - 1) // 2, "largest": -1}
    return {name: sizes[order[place]].tolist() for name, place in places.items()}


def _three_lengths(lengths: NDArray[np.int64]) -> dict[str, int] | None:
    if len(lengths) == 0:
        return None
    median, most = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return {"median": int(median), "percentile_95": int(most), "longest": int(lengths.max())}
