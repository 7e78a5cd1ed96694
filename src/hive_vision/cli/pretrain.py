"""hive-vision pretrain: three stages of pre-training from a recipe."""

import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hive_vision.studies.regression_guard import RegressionGuard
    from hive_vision.training.arguments import PretrainArguments

HELP = """\
usage: hive-vision pretrain RECIPE [key=value ...]

Pre-train an encoder: stage 1 projector, stage 2 projector and language model, stage 3 everything.
Run the same command again after an interruption, it goes on from the last checkpoint.
Several GPUs: torchrun --nproc-per-node 8 -m hive_vision pretrain RECIPE

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  key=value          overrides, e.g. data.train=FOLDER method=sa stage3.max_steps=500
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.settings import settings_parser
    from hive_vision.training.arguments import PretrainArguments
    from hive_vision.training.recipes import load_recipe, recipe_names

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(recipes=", ".join(recipe_names())) + "\n")
        sys.stdout.write(settings_parser(PretrainArguments).format_help().partition("\n\n")[2])
        return
    from hive_vision.cli.runs import run_training
    from hive_vision.training.pretrain import pretrain

    recipe, *overrides = arguments
    settings = load_recipe(recipe, overrides)
    guard = _guard if settings.probe_after_stage else None
    results = run_training(settings.output, partial(pretrain, settings, guard=guard))
    if results is None:
        return
    loss = f"held-out caption loss: {results['held_out_loss']:.4f}"
    if "held_out_loss_shuffled_images" in results:
        loss += f", with images shuffled {results['held_out_loss_shuffled_images']:.4f}"
    sys.stdout.write(f"{loss}\nencoder: {results['encoder']}\n")


def _guard(arguments: "PretrainArguments") -> "RegressionGuard":
    """Make the guard; what it imports takes seconds and is not needed by every run."""
    from hive_vision.studies.regression_guard import RegressionGuard

    return RegressionGuard(arguments)
