"""The command line. Commands are imported when they run: ``--help`` answers at once."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hive_vision.naming import unknown_name

# Name of a command -> module of this package with its ``run(arguments)``.
COMMANDS = {
    "demo": "demo",
    "pretrain": "pretrain",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "caption": "caption",
    "chat": "chat",
    "probe": "probe",
    "export": "export",
    "compare": "compare",
    "report": "report",
    "maps": "maps",
    "plan": "plan",
    "profile": "profile",
    "data": "data",
    "resume-test": "resume_test",
}

HELP = """\
usage: hive-vision COMMAND [options] [key=value ...]

Make a vision encoder better by pre-training it with a language model (HIVE).

commands:
  demo                 the paper in miniature: every method side by side, offline, on a CPU
  pretrain RECIPE      three stages of pre-training; resumes; writes a plain encoder
  finetune RECIPE      a LLaVA-style model on an encoder, in two stages; a stock checkpoint
  evaluate MODEL       VLM benchmarks through lmms-eval; several models side by side
  caption IMAGE        what a pre-trained model says about an image
  chat IMAGE QUESTION  what a fine-tuned model answers about an image
  export ENCODER       a trained encoder as a plain folder, or inside its whole CLIP or SigLIP
  probe ENCODER        classification with the encoder frozen; several encoders side by side
  compare STUDY        methods against each other: pre-trained and probed over several seeds
  maps RUN             gradient maps, attention maps, and both in numbers, side by side
  report RUN...        one HTML page and a model card about runs, demos, studies and their results
  plan RECIPE          memory, time and devices that a recipe needs, before it is started
  profile RECIPE       operations, time and memory of its steps here, method beside method
  data verify RECIPE   find samples that cannot be used; summary and quarantine file
  data show RECIPE     print samples as the trainer sees them, supervised tokens coloured
  data bench RECIPE    measure the loader against what the training steps take
  data build SOURCE    write captioned images into shards that start and load fast
  resume-test RECIPE   prove on this machine that N + N steps are 2N steps

Each command has its own --help. These work everywhere:
  --offline          never ask the network for models or data
  --quiet            only warnings and results
  --debug            show the traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with 0, 1 for an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    switches = {name: name in arguments for name in ("--offline", "--quiet", "--debug")}
    arguments = [argument for argument in arguments if argument not in switches]
    if switches["--offline"]:
        # Read by the hub library when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise ValueError(unknown_name("command", name, COMMANDS))
        _set_up_logging(switches["--quiet"])
        import_module(f"hive_vision.cli.{COMMANDS[name]}").run(rest)
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries without a network
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hive_vision").setLevel(logging.WARNING if quiet else logging.INFO)
