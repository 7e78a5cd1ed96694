"""Models made once for the model tests. Tests that change one copy it first."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from hive_vision.models.hive import HiveForConditionalGeneration
from tests.models.helpers import open_cross_attentions, start_for

MakeHive = Callable[[str, str], HiveForConditionalGeneration]


@pytest.fixture(scope="session")
def fresh_hive(backbone_folders: dict[str, Path]) -> MakeHive:
    """HIVE models as they start, by the names of their backbones."""

    @cache
    def make(vision: str, language: str) -> HiveForConditionalGeneration:
        torch.manual_seed(0)
        return HiveForConditionalGeneration.from_backbones(
            backbone_folders[vision],
            backbone_folders[language],
            cross_attention_start=start_for(language),
        ).eval()

    return make


@pytest.fixture(scope="session")
def open_hive(backbone_folders: dict[str, Path]) -> MakeHive:
    """HIVE models whose cross-attentions have left their start, so that images matter."""

    @cache
    def make(vision: str, language: str) -> HiveForConditionalGeneration:
        torch.manual_seed(0)
        model = HiveForConditionalGeneration.from_backbones(
            backbone_folders[vision],
            backbone_folders[language],
            cross_attention_start=start_for(language),
        ).eval()
        open_cross_attentions(model)
        return model

    return make
