"""hive-vision pretrain: three stages of pre-training from a recipe."""

import logging
import signal
import sys
from pathlib import Path
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
    from hive_vision.training.errors import InterruptedRunError
    from hive_vision.training.pretrain import pretrain
    from hive_vision.training.processes import leave_processes, start_processes
    from hive_vision.training.watchdog import main_said

    recipe, *overrides = arguments
    settings = load_recipe(recipe, overrides)
    main = start_processes().is_main_process
    if not main:
        logging.getLogger("hive_vision").setLevel(logging.ERROR)
    try:
        results = pretrain(settings, guard=_guard if settings.probe_after_stage else None)
    except InterruptedRunError as interruption:
        if main:
            sys.stderr.write(f"{interruption}; run the same command again to go on\n")
        sys.exit(128 + interruption.signal_number)
    except (ValueError, RuntimeError, OSError) as error:
        # A launcher ends the others when one process died: not before the line is written.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not main and main_said(Path(settings.output), str(error)):
            sys.exit(1)
        raise
    leave_processes()
    if not main:
        return
    loss = f"held-out caption loss: {results['held_out_loss']:.4f}"
    if "held_out_loss_shuffled_images" in results:
        loss += f", with images shuffled {results['held_out_loss_shuffled_images']:.4f}"
    sys.stdout.write(f"{loss}\nencoder: {results['encoder']}\n")


def _guard(arguments: "PretrainArguments") -> "RegressionGuard":
    """Make the guard; what it imports takes seconds and is not needed by every run."""
    from hive_vision.studies.regression_guard import RegressionGuard

    return RegressionGuard(arguments)
