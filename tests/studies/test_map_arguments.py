"""What can be asked of maps, and what cannot."""

from typing import Any, get_type_hints

import pytest

from hive_vision.studies.map_arguments import CHOICES, MapsArguments


def test_every_word_that_is_allowed_is_named() -> None:
    hints = get_type_hints(MapsArguments)
    assert {key for key, hint in hints.items() if "Literal" in str(hint)} == set(CHOICES)
    for key, said in CHOICES.items():
        words = {word for word in str(hints[key]).split("'") if word.isalnum()}
        assert all(word in said for word in words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "x.png"}, "image and caption belong together"),
        ({"caption": "x"}, "image and caption belong together"),
        ({"image": "x", "caption": "y", "data": "z"}, "or data; not both"),
        ({"image": "x", "caption": " "}, "caption is empty"),
        ({"image": "x", "caption": "y", "masks": "z"}, "masks are of a data set"),
        ({"samples": -1}, "samples is -1; it must be at least 0"),
        ({"flow_samples": 1}, "flow_samples is 1; give at least 2"),
        ({"samples": 0, "flow_samples": 0}, "there is nothing to look at"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MapsArguments(**options)
