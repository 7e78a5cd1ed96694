"""hive-vision finetune: a LLaVA-style model on an encoder."""

import sys
from functools import partial

HELP = """\
usage: hive-vision finetune RECIPE [key=value ...]

Fine-tune a LLaVA-style model on an encoder: stage 1 the connector, stage 2 the language model with
the encoder frozen. Writes a stock transformers checkpoint into the run's model/. Run the same
command again after an interruption, it goes on from the last checkpoint.
Several GPUs: torchrun --nproc-per-node 8 -m hive_vision finetune RECIPE

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  key=value          overrides, e.g. model.vision=runs/hive/encoder stage2.max_steps=500
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.settings import settings_parser
    from hive_vision.training.arguments import FinetuneArguments
    from hive_vision.training.recipes import FINETUNE, load_finetune_recipe, recipe_names

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(recipes=", ".join(recipe_names(FINETUNE))) + "\n")
        sys.stdout.write(settings_parser(FinetuneArguments).format_help().partition("\n\n")[2])
        return
    from hive_vision.cli.runs import run_training
    from hive_vision.training.finetune import finetune

    recipe, *overrides = arguments
    settings = load_finetune_recipe(recipe, overrides)
    results = run_training(settings.output, partial(finetune, settings))
    if results is None:
        return
    last = results["stages"][-1]
    sys.stdout.write(
        f"held-out loss: {last['held_out_loss']:.4f}, with images shuffled "
        f"{last['held_out_loss_shuffled_images']:.4f}\nmodel: {results['model']}\n"
    )
