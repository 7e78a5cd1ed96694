"""Build the miniature where it is missing: drawn data, foundation models, conversations."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hive_vision.conversation import IMAGE_TOKEN, Turn
from hive_vision.data.instruction_sources import InstructionSource, open_instructions
from hive_vision.data.instructions import read_turns
from hive_vision.data.miniature import MiniatureData, build_miniature_data, build_vlm_data
from hive_vision.data.miniature.vlm import (
    BRIEFLY,
    LETTER,
    OR_UNANSWERABLE,
    SETTINGS,
    vlm_settings,
)
from hive_vision.folders import flatten, read_json
from hive_vision.training.foundations import Foundations, train_foundations, train_instruct_llama

logger = logging.getLogger(__name__)

VLM_QUESTIONS = 400  # in each benchmark, where there are scenes enough
# Raised when the same settings come to mean other data or models, so that a folder built by an
# older version is refused instead of reused.
_FORMAT = 1


@dataclass(frozen=True)
class MiniatureSettings:
    """The miniature: its data and its foundation models.

    Args:
        folder: where it is built, once; `data/` and `foundations/` lie below it.
        data: what to draw.
        foundations: what to train.
    """

    folder: str = "runs/miniature"
    data: MiniatureData = field(default_factory=MiniatureData)
    foundations: Foundations = field(default_factory=Foundations)


def ensure_miniature(settings: MiniatureSettings) -> Path:
    """Build what is missing of the miniature and return its folder.

    Args:
        settings: what to build, and where.

    Returns:
        The folder, which holds `data/` (see `build_miniature_data`), `foundations/siglip`,
        `foundations/llama` and `settings.json`.

    Raises:
        ValueError: if the folder was built with other settings, or holds something else.
    """
    folder = Path(settings.folder)
    wanted = {
        "format": _FORMAT,
        "data": asdict(settings.data),
        "foundations": asdict(settings.foundations),
    }
    if not _is_recorded(folder, wanted):
        # Recorded first: what an interrupted build leaves behind is known to be of these settings.
        folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps(wanted, indent=2) + "\n"
        (folder / "settings.json").write_text(record, encoding="utf-8")
    data, foundations = folder / "data", folder / "foundations"
    if not data.exists():
        logger.info("drawing the miniature's data in %s", data)
        build_miniature_data(data, settings.data)
    if not foundations.exists():
        train_foundations(data, foundations, settings.foundations)
    return folder


def ensure_vlm_data(settings: MiniatureSettings) -> Path:
    """Build what is missing of the miniature, with what VLMs are made of and measured on.

    Returns:
        The folder; `vlm/` in it is what `build_vlm_data` writes, `foundations/llama-instruct` a
        language model that has read the conversations but seen no picture.

    Raises:
        ValueError: as `ensure_miniature`; and if there are questions of another version.
    """
    folder = ensure_miniature(settings)
    data, llama = folder / "vlm", folder / "foundations" / "llama-instruct"
    wanted = vlm_settings(VLM_QUESTIONS, settings.data.seed)
    if data.is_dir() and read_json(data / SETTINGS) != wanted:
        raise ValueError(
            f"{data} has questions of another version of this package: delete it and {llama}, or "
            "choose another folder for the miniature"
        )
    if not data.is_dir():
        build_vlm_data(folder / "data", data, VLM_QUESTIONS, settings.data.seed)
    if not llama.is_dir():
        stored = open_instructions(InstructionSource(str(data / "instructions")))
        conversations = [
            [
                Turn(role=turn["role"], content=turn["content"].removeprefix(f"{IMAGE_TOKEN}\n"))
                for turn in read_turns(stored.stored_turns(row), images=1)
            ]
            for row in range(len(stored))
        ]
        # A third of what they would be long otherwise.
        prompts = (BRIEFLY, OR_UNANSWERABLE, LETTER)
        train_instruct_llama(conversations, llama, settings.foundations, phrases=prompts)
    return folder


def _is_recorded(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Say whether the folder records the wanted miniature (True) or is still free (False).

    Raises:
        ValueError: if it is neither.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another folder for the miniature")
    path = folder / "settings.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files but no miniature (no settings.json): choose another folder"
            )
        return False
    recorded = flatten(json.loads(path.read_text(encoding="utf-8")))
    asked = flatten(wanted)
    for key in sorted(recorded.keys() | asked.keys()):
        if recorded.get(key) != asked.get(key):
            raise ValueError(
                f"{folder} was built with {key}={recorded.get(key)}, but {key}={asked.get(key)} "
                "is asked for: delete the folder or choose another one"
            )
    return True
