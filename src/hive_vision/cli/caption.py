"""hive-vision caption: what a pre-trained model says about images."""

import sys
from dataclasses import dataclass

HELP = """\
usage: hive-vision caption IMAGE ... model=RUN [max_new_tokens=60]

Write captions with a model that hive-vision pretrain made (method hive or cascaded).

  hive-vision caption photo.jpg another.png model=runs/miniature-hive

  IMAGE              image files
  model=RUN          a run folder, whose last finished stage is taken, or a stage's model folder
  max_new_tokens=N   at most so many tokens for each caption (60)
"""


@dataclass(frozen=True)
class CaptionArguments:
    """What the command can be told.

    Args:
        model: Run folder or model folder.
        max_new_tokens: At most so many tokens for each caption.
    """

    model: str
    max_new_tokens: int = 60


def run(arguments: list[str]) -> None:
    """Run the command."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    from hive_vision.evaluation.generation import write_captions
    from hive_vision.settings import read_settings

    images = [word for word in arguments if not word.startswith(("model=", "max_new_tokens="))]
    if not images:
        raise ValueError("caption: no image given; hive-vision caption IMAGE ... model=RUN")
    options = [word for word in arguments if word not in images]
    settings = read_settings(CaptionArguments, options, what="caption")
    captions = write_captions(settings.model, images, settings.max_new_tokens)
    for image, caption in zip(images, captions, strict=True):
        sys.stdout.write(f"{image}: {caption}\n" if len(images) > 1 else f"{caption}\n")
