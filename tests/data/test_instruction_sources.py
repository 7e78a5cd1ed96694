"""Sources of conversations that cannot be opened; test_instructions.py reads the good ones."""

from pathlib import Path

import pytest

from hive_vision.data.instruction_sources import InstructionSource, open_instructions
from tests.data.test_instructions import hub_form


class TestRefusals:
    def test_columns(self, tmp_path: Path) -> None:
        hub_form().save_to_disk(tmp_path / "x")
        for key in ("image_column", "conversation_column"):
            source = InstructionSource(str(tmp_path / "x"), **{key: "nothing"})
            with pytest.raises(ValueError, match=f"no column 'nothing'.*set {key}"):
                open_instructions(source)
        source = InstructionSource(str(tmp_path / "x"), conversation_column="id")
        with pytest.raises(ValueError, match="holds string, not lists of turns"):
            open_instructions(source)

    @pytest.mark.parametrize(
        "content", ["[1]", '[{"image": "a.png"}]', "[", '[{"conversations": 3}]']
    )
    def test_not_llava_json(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "chat.json").write_text(content)
        with pytest.raises(ValueError, match="is not llava json") as error:
            open_instructions(InstructionSource(str(tmp_path / "chat.json")))
        assert "\n" not in str(error.value)

    def test_weight(self) -> None:
        with pytest.raises(ValueError, match="weight of 'x' is 0"):
            InstructionSource("x", weight=0)
