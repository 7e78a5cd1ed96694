"""The command line. Commands are imported when they run: ``--help`` answers at once."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

HELP = """\
usage: hive-vision COMMAND [options] [key=value ...]

Make a vision encoder better by pre-training it with a language model (HIVE).

commands:
  demo               the paper in miniature: every method side by side, offline, on a CPU
  pretrain RECIPE    three stages of pre-training; resumes; writes a plain encoder

Each command has its own --help. These work everywhere:
  --offline          never ask the network for models or data
  --quiet            only warnings and results
  --debug            show the traceback of an error
"""

DEMO_HELP = """\
usage: hive-vision demo [--cascaded | --no-cascaded] [--output FOLDER] [--recipe RECIPE]

Draw the miniature data, train its small foundation models, pre-train an encoder with each method
(base, sa, cascaded, hive) in a process of its own, and print one table. Run again after an
interruption: what is done is not done again.

  --output FOLDER    where the runs go (runs/demo)
  --recipe RECIPE    what the runs do (demo)
  --no-cascaded      leave the cascaded baseline out, to save time
"""

PRETRAIN_HELP = """\
usage: hive-vision pretrain RECIPE [key=value ...]

Pre-train an encoder: stage 1 projector, stage 2 projector and language model, stage 3 everything.
Run the same command again after an interruption, it goes on from the last checkpoint.

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  key=value          overrides, e.g. data.train=FOLDER method=sa stage3.max_steps=500
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with 0, 1 for an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    switches = {name: name in arguments for name in ("--offline", "--quiet", "--debug")}
    arguments = [argument for argument in arguments if argument not in switches]
    if switches["--offline"]:
        # Read by the hub library when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    commands: dict[str, Callable[[list[str]], None]] = {"demo": _demo, "pretrain": _pretrain}
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    name, *rest = arguments
    try:
        if name not in commands:
            from hive_vision.naming import unknown_name

            raise ValueError(unknown_name("command", name, commands))
        _set_up_logging(switches["--quiet"])
        commands[name](rest)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to go on\n")
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        if switches["--debug"]:
            raise
        sys.stderr.write(f"hive-vision: {error}\n")
        sys.exit(1)


def _set_up_logging(quiet: bool) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries without a network
    logging.getLogger("hive_vision").setLevel(logging.WARNING if quiet else logging.INFO)


def _pretrain(arguments: list[str]) -> None:
    from hive_vision.training.recipes import load_recipe, recipe_names, recipe_parser

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(PRETRAIN_HELP.format(recipes=", ".join(recipe_names())) + "\n")
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


def _demo(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(DEMO_HELP)
        return
    import argparse
    from pathlib import Path

    from rich.console import Console

    from hive_vision.reporting.tables import method_table
    from hive_vision.studies.demo import run_demo
    from hive_vision.training.arguments import Method
    from hive_vision.training.recipes import load_recipe

    parser = argparse.ArgumentParser(prog="hive-vision demo", add_help=False, exit_on_error=False)
    parser.add_argument("--output", default="runs/demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--cascaded", action=argparse.BooleanOptionalAction, default=True)
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"demo: {error}") from error
    if unknown:
        raise ValueError(f"demo: unknown option {unknown[0]!r}; see hive-vision demo --help")
    recipe = load_recipe(options.recipe)
    if recipe.miniature is None:
        raise ValueError(f"recipe {options.recipe!r} has no miniature section; the demo needs one")
    methods: list[Method] = ["base", "sa", "cascaded", "hive"]
    if not options.cascaded:
        methods.remove("cascaded")
    probe = "texture"
    results = run_demo(options.recipe, Path(options.output), recipe.miniature, methods, probe)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(method_table(results, probe))
    console.print(f"The pre-trained encoder: {results[-1]['encoder']}")
