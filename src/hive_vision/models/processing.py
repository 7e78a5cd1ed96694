"""Images and captions to model inputs.

The text a model reads is ``<start> caption <end>``: the start token (BOS, or EOS where a
tokenizer has none) is never predicted, everything after it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from hive_vision.models.backbones import Source, blank_image, load_config
from hive_vision.models.configuration import HiveConfig

# Output rows beyond the tokenizer are padding to a round number in published models (under 1%).
MAX_SPARE_ROWS = 0.05


class HiveProcessor(ProcessorMixin):
    """An encoder's image processor and a language model's tokenizer.

    Args:
        image_processor: As it came with the encoder.
        tokenizer: As it came with the language model; it must have an end-of-sequence token.
        max_text_tokens: Longer captions are cut, start and end token included (the paper's 77).
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text_tokens: int = 77,
        **kwargs: Any,
    ) -> None:
        if max_text_tokens < 3:
            raise ValueError(f"max_text_tokens is {max_text_tokens}; it must be at least 3")
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so captions could never end; "
                "set tokenizer.eos_token"
            )
        if tokenizer is not None and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.max_text_tokens = max_text_tokens
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_backbones(cls, vision: str | Path, language: str | Path, **options: Any) -> Self:
        """Take the image processor of the encoder and the tokenizer of the language model.

        Raises:
            ValueError: If either is missing, or if the tokenizer and the language model's
                embedding do not belong together.
        """
        load_config(vision, "vision")
        text_config = load_config(language, "language")
        image_processor = load_image_processor(vision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(language, config=text_config)
        except (OSError, ValueError, ImportError) as error:
            reason = _first_line(error)
            if not (is_sentencepiece_available() and is_protobuf_available()):
                reason = (
                    "if it is a sentencepiece model (tokenizer.model, as MobileLLM's), install "
                    f"what reads it: pip install sentencepiece protobuf ({reason})"
                )
            raise ValueError(f"{str(language)!r} has no tokenizer: {reason}") from error
        rows = text_config.vocab_size
        used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        # Further special tokens may lie beyond the embedding (Gemma 3): captions never have them.
        beyond = sum(token >= rows for token in set(tokenizer.all_special_ids) - used)
        check_vocabulary(len(tokenizer) - beyond, rows, source=language)
        return cls(image_processor, tokenizer, **options)

    @property
    def start_token_id(self) -> int:
        """What stands before every caption: BOS, or EOS for tokenizers without one."""
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id
        return eos if bos is None else bos

    def encode_captions(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokenize captions to ``<start> caption <end>``, cut to ``max_text_tokens`` with the end.

        Returns:
            One list of token ids for each caption.
        """
        if not captions:
            return []
        room = self.max_text_tokens - 2
        encoded = self.tokenizer(
            list(captions),
            add_special_tokens=False,
            return_attention_mask=False,  # lists that nobody reads cost 30% of the time
            return_token_type_ids=False,
            verbose=False,  # about long captions
            split_special_tokens=True,  # "<image>" in a caption is text
        )["input_ids"]
        start, end = self.start_token_id, self.tokenizer.eos_token_id
        # Cut here: a tokenizer remembers what it was told and would be saved otherwise when the
        # captions' tokens come from the cache.
        return [[start, *ids[:room], end] for ids in encoded]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images and the beginning of captions for ``generate``.

        Args:
            images: One image or a list of them.
            text: The beginning of each caption; nothing to write one from the start.
            return_tensors: As in transformers.
            **kwargs: For the image processor.

        Returns:
            ``pixel_values`` (B, C, H, W), whatever else the image processor gives, and
            left-padded ``input_ids`` and ``attention_mask``.
        """
        features: dict[str, Any] = {}
        if images is not None:
            features.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        if text is None:
            text = [""] * (len(features["pixel_values"]) if images is not None else 1)
        prompts = [text] if isinstance(text, str) else list(text)
        encoded = [ids[:-1] for ids in self.encode_captions(prompts)]
        padded = self.tokenizer.pad(
            {"input_ids": encoded}, padding_side="left", return_tensors=return_tensors
        )
        features.update(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
        return BatchFeature(features, tensor_type=return_tensors)


def load_image_processor(vision: str | Path) -> Any:
    """Load what prepares images for an encoder.

    Raises:
        ValueError: If the encoder came without one.
    """
    try:
        return AutoImageProcessor.from_pretrained(vision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(vision)!r} has no image processor (preprocessor_config.json); save that of the "
            f"encoder it came from beside it: {_first_line(error)}"
        ) from error


def check_image_size(image_processor: Any, config: PreTrainedConfig, name: str) -> None:
    """Refuse for LLaVA what would give another number of image tokens than it has places.

    Args:
        image_processor: The encoder's.
        config: The encoder's.
        name: What to call the encoder.

    Raises:
        ValueError: If the two disagree.
    """
    expected = blank_image(config).shape[-2:]
    image = Image.new("RGB", (expected[1], expected[0]))
    given = image_processor(image, return_tensors="pt")["pixel_values"].shape
    if given[-2:] != expected:
        raise ValueError(
            f"the image processor of {name!r} gives {tuple(given[-2:])} pixels but the encoder is "
            f"configured for {tuple(expected)}; transformers' LLaVA (method sa) needs them to agree"
        )


def check_vocabulary(tokens: int, rows: int, source: Source) -> None:
    """Refuse a tokenizer that does not belong to the language model's embedding.

    Raises:
        ValueError: If there are more tokens than embedding rows, or many rows to spare.
    """
    if tokens > rows or rows - tokens > MAX_SPARE_ROWS * rows:
        name = type(source).__name__ if isinstance(source, PreTrainedConfig) else str(source)
        raise ValueError(
            f"the tokenizer of {name!r} has {tokens} tokens but the embedding has {rows} rows; "
            "use the tokenizer that the language model was trained with"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


AutoProcessor.register(HiveConfig, HiveProcessor)
