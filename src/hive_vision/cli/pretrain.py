"""hive-vision pretrain: three stages of pre-training from a recipe."""

import sys

HELP = """\
usage: hive-vision pretrain RECIPE [key=value ...]

Pre-train an encoder: stage 1 projector, stage 2 projector and language model, stage 3 everything.
Run the same command again after an interruption, it goes on from the last checkpoint.

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  key=value          overrides, e.g. data.train=FOLDER method=sa stage3.max_steps=500
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.training.recipes import load_recipe, recipe_names, recipe_parser

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(recipes=", ".join(recipe_names())) + "\n")
        sys.stdout.write(recipe_parser().format_help().partition("\n\n")[2])
        return
    from hive_vision.training.pretrain import InterruptedRunError, pretrain

    recipe, *overrides = arguments
    try:
        results = pretrain(load_recipe(recipe, overrides))
    except InterruptedRunError as interruption:
        sys.stderr.write(f"{interruption}; run the same command again to go on\n")
        sys.exit(130)
    loss = f"held-out caption loss: {results['held_out_loss']:.4f}"
    if "held_out_loss_shuffled_images" in results:
        loss += f", with images shuffled {results['held_out_loss_shuffled_images']:.4f}"
    sys.stdout.write(f"{loss}\nencoder: {results['encoder']}\n")
