"""hive-vision evaluate: VLM benchmarks through lmms-eval."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hive_vision.cli.reports import check_output, show_report

if TYPE_CHECKING:
    from hive_vision.evaluation.vlm_benchmarks import EvaluateArguments

HELP = """\
usage: hive-vision evaluate MODEL [output=FOLDER] [key=value ...]
       hive-vision evaluate --compare NAME=MODEL[,MODEL...] NAME=MODEL[,MODEL...] ...

How good is a vision-language model? Runs lmms-eval, in a process of its own, and checks that every
sample was answered. Several models of one NAME are runs of one method, e.g. with other seeds.

  hive-vision evaluate runs/vlm-miniature tasks=gqa data=copies
  hive-vision evaluate --compare base=runs/vlm-base sa=runs/vlm-sa hive=runs/vlm-hive

  MODEL              a run folder of hive-vision finetune, a LLaVA folder, or a hub id
  --compare          several models side by side; the best is bold where the intervals say so
  output=FOLDER      results.json, table.md and lmms-eval's logs go there (runs/evaluate)

lmms-eval is installed with pip install '.[eval]' in the checkout, best in an environment of its
own: give its python as python=PATH.

"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.evaluation.vlm_benchmarks import EvaluateArguments
    from hive_vision.settings import settings_parser

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        sys.stdout.write(settings_parser(EvaluateArguments).format_help().partition("\n\n")[2])
        return
    from hive_vision.folders import write_json
    from hive_vision.reporting.vlm_tables import vlm_json, vlm_report
    from hive_vision.studies.vlm import compare_vlms

    models, output, settings = parse(arguments)
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    results = compare_vlms(models, output, settings)
    write_json(output / "results.json", vlm_json(results))
    show_report(vlm_report(results), output)


def parse(
    arguments: Sequence[str],
) -> tuple[dict[str, list[str]], Path, "EvaluateArguments"]:
    """Read a command line.

    Returns:
        Models by name, the output folder, and how to evaluate.

    Raises:
        ValueError: If it is none.
    """
    from dataclasses import fields

    from hive_vision.evaluation.vlm_baselines import MAJORITY, blind
    from hive_vision.evaluation.vlm_benchmarks import EvaluateArguments
    from hive_vision.settings import read_settings

    compare = "--compare" in arguments
    keys = {field.name for field in fields(EvaluateArguments)}
    models: dict[str, list[str]] = {}
    output, options = "runs/evaluate", []
    for word in arguments:
        key, equals, value = word.removeprefix("--").partition("=")
        if word == "--compare":
            continue
        if equals and key == "output":
            output = value
        elif equals and key in keys and not Path(word).exists():
            options.append(f"{key}={value}")
        elif word.startswith("--"):
            raise ValueError(f"evaluate: unknown option {word!r}; see hive-vision evaluate --help")
        elif compare:
            if not equals or not value:
                raise ValueError(f"evaluate: write NAME=MODEL; got {word!r}")
            if key == MAJORITY or key.startswith(blind("")):
                raise ValueError(f"evaluate: a baseline is called {key!r}; choose another NAME")
            if key in models:
                raise ValueError(f"evaluate: two models are called {key!r}; write NAME=MODEL,MODEL")
            models[key] = [_model_folder(model) for model in value.split(",")]
        else:
            name = Path(word).parent.name if Path(word).name == "model" else Path(word).name
            models[name] = [_model_folder(word)]
    if not models or (not compare and len(models) != 1):
        raise ValueError(f"evaluate: give one MODEL, or --compare; got {len(models)}")
    return models, Path(output), read_settings(EvaluateArguments, options, what="evaluate")


def _model_folder(given: str) -> str:
    """Take a run's model where the run is given."""
    inside = Path(given) / "model"
    return str(inside) if (inside / "config.json").is_file() else given
