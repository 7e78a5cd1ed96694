"""hive-vision chat: what a fine-tuned model answers."""

import sys
from dataclasses import dataclass

HELP = """\
usage: hive-vision chat IMAGE QUESTION model=RUN [max_new_tokens=200]

Ask a model that hive-vision finetune made, or any other LLaVA, about an image.

  hive-vision chat photo.jpg "what is to the left of the star?" model=runs/vlm-miniature

  IMAGE              image file
  QUESTION           in quotes
  model=RUN          a run folder, model folder, or hub id
  max_new_tokens=N   at most so many tokens for the answer (200)
"""


@dataclass(frozen=True)
class ChatArguments:
    """What the command can be told.

    Args:
        model: Run folder, model folder, or hub id.
        max_new_tokens: At most so many tokens for the answer.
    """

    model: str
    max_new_tokens: int = 200


def run(arguments: list[str]) -> None:
    """Run the command."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    from hive_vision.evaluation.generation import write_answer
    from hive_vision.settings import read_settings

    said = [word for word in arguments if not word.startswith(("model=", "max_new_tokens="))]
    if len(said) != 2:
        raise ValueError(
            f"chat: give one IMAGE and one QUESTION in quotes; got {len(said)} words beside options"
        )
    options = [word for word in arguments if word not in said]
    settings = read_settings(ChatArguments, options, what="chat")
    image, question = said
    answer = write_answer(settings.model, image, question, settings.max_new_tokens)
    sys.stdout.write(f"{answer}\n")
