"""hive-vision: pre-train vision encoders with a language model (HIVE).

The public names are imported on first use, so that ``hive-vision --help`` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hive_vision.models.configuration import HiveConfig
    from hive_vision.models.hive import HiveForConditionalGeneration
    from hive_vision.models.processing import HiveProcessor
    from hive_vision.training.pretrain import pretrain
    from hive_vision.training.recipes import load_recipe
    from hive_vision.training.trainer import HiveTrainer

__version__ = "0.1.0"

_HOMES = {
    "HiveConfig": "hive_vision.models.configuration",
    "HiveForConditionalGeneration": "hive_vision.models.hive",
    "HiveProcessor": "hive_vision.models.processing",
    "HiveTrainer": "hive_vision.training.trainer",
    "load_recipe": "hive_vision.training.recipes",
    "pretrain": "hive_vision.training.pretrain",
}

__all__ = [
    "HiveConfig",
    "HiveForConditionalGeneration",
    "HiveProcessor",
    "HiveTrainer",
    "load_recipe",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hive_vision' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
