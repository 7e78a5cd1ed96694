"""What a whole dual encoder (CLIP, SigLIP) knows without training: classes by name, and retrieval.

Shapes: M labelled images, N captioned images, P captions, C classes, T texts, B images at once,
E width of the space that images and texts are compared in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BatchEncoding, PreTrainedModel

from hive_vision.data.classification import LabelledImages
from hive_vision.data.images import UnusableImageError, decode_image
from hive_vision.data.parallel import row_ranges, work_through
from hive_vision.data.sources import CaptionSource
from hive_vision.evaluation.features import Prepare
from hive_vision.models.merging import load_dual_encoder, load_processor

TEMPLATES = ("a photo of a {}.",)
RECALLED = (1, 5, 10)
SCORES_AT_ONCE = 2**24  # 64 MB, and a few masks of that shape


class DualEncoder:
    """A dual encoder in evaluation mode with its processor.

    Args:
        name: What to call it.
        model: The whole model.
        processor: Its tokenizer and image processor.
        precision: ``float32``, or ``bfloat16`` for autocast.

    Raises:
        ValueError: If nothing says how long its texts are, or its tokenizer cannot pad.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        processor: Any,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor = processor
        self.precision = precision
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {name!r} has no padding token; set its pad_token")
        # A tokenizer that does not know says 10^30.
        positions: int | None = getattr(model.config.text_config, "max_position_embeddings", None)
        self.max_tokens = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        if self.max_tokens > 2**16:
            raise ValueError(
                f"nothing says how many tokens a text of {name!r} has; set model_max_length in its "
                "tokenizer_config.json"
            )

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> Self:
        """Load a folder or hub id.

        Raises:
            ValueError: If it cannot be loaded, is no dual encoder, or has no processor.
        """
        return cls(str(source), load_dual_encoder(source), load_processor(source), **options)

    def embed_images(self, inputs: Mapping[str, Any]) -> Tensor:
        """Embed what the image processor gave for B images.

        Returns:
            (B, E) of length 1, float32, on the model's device.

        Raises:
            ValueError: If something is not finite.
        """
        return self._embed("get_image_features", inputs)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed T texts; what is too long for the model is cut.

        Returns:
            (T, E) of length 1, float32, on the model's device.

        Raises:
            ValueError: If there are none, or something is not finite.
        """
        if not texts:
            raise ValueError("there are no texts to compare images with")
        tokenize = _Tokenize(texts, self.processor, self.max_tokens)
        batches = work_through(
            tokenize, row_ranges(len(texts), batch_size), 1, "reading texts", "texts"
        )
        return torch.cat([self._embed("get_text_features", inputs) for inputs in batches])

    @torch.no_grad()
    def _embed(self, method: str, inputs: Mapping[str, Any]) -> Tensor:
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            output = getattr(self.model, method)(**inputs)
        # The pooled features themselves, or an output that has them: versions differ.
        features = output if isinstance(output, Tensor) else output.pooler_output
        if not torch.isfinite(features).all():
            raise ValueError(
                f"{self.name!r} gives features that are not finite; check its weights, or use "
                "precision float32"
            )
        return normalize(features.float(), dim=-1)


@dataclass(frozen=True)
class _Tokenize:
    """Tokenizes ranges of texts, all to the full length.

    SigLIP was trained so and reads its padding; models with a mask (CLIP) do not care.
    """

    texts: Sequence[str]
    processor: Any
    max_tokens: int

    def __call__(self, rows: range) -> BatchEncoding:
        return self.processor(
            text=list(self.texts[rows.start : rows.stop]),
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )


@dataclass(frozen=True, eq=False)
class _SourceImages:
    """The images of a caption source, decoded."""

    source: CaptionSource

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Image.Image:
        try:
            return decode_image(self.source.read_image(row))
        except UnusableImageError as error:
            raise ValueError(
                f"image {self.source.image_name(row)} of {self.name} cannot be read: {error}; "
                "repair it or remove it"
            ) from error


def embed_classes(
    encoder: DualEncoder, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Embed classes by their names, each in all templates.

    Args:
        encoder: The dual encoder.
        class_names: C of them; underscores are read as spaces.
        templates: Texts with ``{}`` where the name goes.

    Returns:
        (C, E) of length 1: the mean over the templates, each of length 1.

    Raises:
        ValueError: If there are no names or templates, or a template has no place for the name.
    """
    if not class_names:
        raise ValueError(
            "the set has no class names, which zero-shot classification needs; give a set whose "
            "labels are a ClassLabel with names, e.g. one folder for each class"
        )
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"template {template!r} has no place for the class name; write {{}} where it goes"
            )
    if not templates:
        raise ValueError(f"there are no templates; give some, such as {TEMPLATES[0]!r}")
    names = [name.replace("_", " ") for name in class_names]
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embedded = encoder.embed_texts(prompts).reshape(len(names), len(templates), -1)
    return normalize(embedded.mean(dim=1), dim=-1)


def classify_zero_shot(
    encoder: DualEncoder,
    images: LabelledImages,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 128,
    workers: int = 1,
) -> NDArray[np.bool_]:
    """Give each image the class whose embedded name is nearest by cosine.

    Args:
        encoder: The dual encoder.
        images: M images.
        class_names: C of them, in the order of the class numbers.
        templates: See ``embed_classes``.
        batch_size: Images at once.
        workers: Processes that decode and preprocess; with one, this one does.

    Returns:
        (1, M) which images were classified correctly; 1 stands for the seeds of a probe.

    Raises:
        ValueError: If there are no names or fewer than classes, or an image cannot be decoded.
    """
    highest = int(images.labels.max())
    if class_names and highest >= len(class_names):
        raise ValueError(
            f"{images.name} has images of class {highest} but {len(class_names)} class names"
        )
    classes = embed_classes(encoder, class_names, templates)
    predicted = [
        (encoder.embed_images(inputs) @ classes.T).argmax(dim=1).cpu().numpy()
        for inputs in _prepared(encoder, images, batch_size, workers)
    ]
    correct: NDArray[np.bool_] = np.concatenate(predicted) == images.labels
    return correct[None]


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Which queries found what belongs to them among the first k, for each k of 1, 5, 10.

    The mean of an array is R@k. Each has a leading 1, as ``statistics.accuracy`` reads it; captions
    of one image are not independent, so an interval over captions is somewhat too narrow.

    Attributes:
        image_to_text: k -> (1, N), whether a caption of the image is among its k nearest.
        text_to_image: k -> (1, P), whether the caption's image is among its k nearest.
    """

    image_to_text: Mapping[int, NDArray[np.bool_]]
    text_to_image: Mapping[int, NDArray[np.bool_]]


def retrieve(
    encoder: DualEncoder, source: CaptionSource, batch_size: int = 128, workers: int = 1
) -> Retrieval:
    """Search captions by images and images by captions, by cosine.

    Empty captions take no part, nor do images without another. Of equal scores the first wins, so
    that an encoder for which all is equal finds as much as chance.

    Args:
        encoder: The dual encoder.
        source: Images with captions.
        batch_size: Images at once.
        workers: Processes that decode and preprocess; with one, this one does.

    Raises:
        ValueError: If there is no caption, or an image cannot be decoded.
    """
    source = _with_captions(source)
    texts = encoder.embed_texts(source.captions.to_pylist())
    prepared = _prepared(encoder, _SourceImages(source), batch_size, workers)
    images = torch.cat([encoder.embed_images(inputs) for inputs in prepared])
    owners = torch.from_numpy(source.image_rows).to(encoder.device)
    of_images = _ranks(images, texts, torch.arange(len(images), device=encoder.device), owners)
    of_texts = _ranks(texts, images, owners, torch.arange(len(images), device=encoder.device))
    return Retrieval(
        {k: (of_images < k)[None] for k in RECALLED}, {k: (of_texts < k)[None] for k in RECALLED}
    )


def _prepared(
    encoder: DualEncoder, images: LabelledImages | _SourceImages, batch_size: int, workers: int
) -> Any:
    prepare = Prepare(images, encoder.processor.image_processor)
    ranges = row_ranges(len(images), batch_size)
    return work_through(prepare, ranges, workers, f"reading {images.name}")


def _with_captions(source: CaptionSource) -> CaptionSource:
    """Keep captions with a text, and images with such a caption.

    Raises:
        ValueError: If there are none.
    """
    texts = source.captions.to_pylist()
    written = np.flatnonzero([bool(text and text.strip()) for text in texts])
    if not len(written):
        raise ValueError(f"{source.name!r} has no captions to search for")
    if len(written) < len(texts):
        source = source.select_pairs(written)
    used = np.unique(source.image_rows)
    return source.select_images(used) if len(used) < len(source) else source


def _ranks(
    queries: Tensor, found: Tensor, query_owners: Tensor, found_owners: Tensor
) -> NDArray[np.int64]:
    """Give the place, from 0, of the first result that belongs to each query.

    In parts: the scores of all queries with all results would need N * P numbers.

    Args:
        queries: (Q, E).
        found: (F, E).
        query_owners: (Q,) image that each query is or belongs to.
        found_owners: (F,) the same of what is found; each query's is among them.

    Returns:
        (Q,).
    """
    places = torch.arange(len(found), device=found.device)
    ranks = []
    for rows in row_ranges(len(queries), max(1, SCORES_AT_ONCE // len(found))):
        part = slice(rows.start, rows.stop)
        scores = queries[part] @ found.T
        own = query_owners[part, None] == found_owners
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        tied = scores == best
        first = places.where(tied & own, len(found)).amin(dim=1, keepdim=True)
        before = (scores > best) | (tied & (places < first))
        ranks.append(before.sum(dim=1).cpu().numpy())
    return np.concatenate(ranks)
