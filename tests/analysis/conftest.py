"""Inspected models by their parts, made once. Tests that change one copy it first."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hive_vision.analysis.inspection import InspectedModel
from tests.analysis.helpers import inspect

Inspect = Callable[..., InspectedModel]


@pytest.fixture(scope="session")
def inspected(backbone_folders: dict[str, Path]) -> Inspect:
    """Make a model of ``method``, an encoder and a language model."""

    @cache
    def make(
        method: str, vision: str = "clip", language: str = "llama", feature_layer: int = -1
    ) -> InspectedModel:
        return inspect(backbone_folders, method, vision, language, feature_layer)

    return make
