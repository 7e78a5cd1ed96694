"""The miniature: small captioned scenes with everything known about them, drawn offline."""

from hive_vision.data.miniature.build import (
    CLASSIFICATION_SETS,
    MiniatureData,
    build_miniature_data,
)
from hive_vision.data.miniature.vlm import build_vlm_data

__all__ = ["CLASSIFICATION_SETS", "MiniatureData", "build_miniature_data", "build_vlm_data"]
