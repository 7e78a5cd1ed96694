"""The model of a recipe without its weights: on the meta device, or random where it is timed."""

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hive_vision.models.backbones import blank_images, load_config
from hive_vision.models.hive import HiveForConditionalGeneration
from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
from hive_vision.training.arguments import PretrainArguments


def backbone_config(source: str, role: str) -> PreTrainedConfig:
    """Read a backbone's configuration: a folder's, the copy of this package, or the hub's.

    The package has those of its recipes, so that they can be planned and timed without a network.

    Args:
        source: Local folder or hub id.
        role: ``vision`` or ``language``.

    Raises:
        ValueError: If there is none.
    """
    shipped = Path(str(files("hive_vision.recipes") / "shapes" / source))
    is_shipped = not Path(source).exists() and (shipped / "config.json").is_file()
    return load_config(str(shipped) if is_shipped else source, role)


def recipe_model(
    arguments: PretrainArguments, device: str = "meta", side: int | None = None
) -> tuple[PreTrainedModel, dict[str, Tensor], int]:
    """Make a recipe's model from configurations alone.

    Args:
        arguments: The recipe.
        device: ``meta`` for shapes only; anywhere else the weights are random.
        side: Of the images in pixels, instead of the encoder's own.

    Returns:
        The model, what its encoder is called with for one image, and how many placeholders the
        language model reads for an image.
    """
    vision = backbone_config(arguments.model.vision, "vision")
    language = backbone_config(arguments.model.language, "language")
    if side is not None:
        vision.image_size = side
    with torch.device(device):
        images = {name: value for name, value in blank_images(vision).items() if value is not None}
        if arguments.method == "sa":
            baseline = SelfAttentionForConditionalGeneration.from_backbones(
                vision,
                language,
                image_token_id=language.vocab_size - 1,
                feature_layer=arguments.model.sa_feature_layer,
            )
            return baseline, images, int(baseline.config.image_seq_length)
        fusion = arguments.model.fusion_options(arguments.method)
        model = HiveForConditionalGeneration.from_backbones(vision, language, **fusion)
    return model, images, 0
