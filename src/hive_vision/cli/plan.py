"""hive-vision plan: what a recipe needs, before it is started."""

import sys
from collections.abc import Callable
from typing import Any

HELP = """\
usage: hive-vision plan RECIPE [device=NAME] [devices=N] [tokens=N] [samples=N] [measure=BOOL]
                        [--json] [key=value ...]

Say what a recipe needs before it is started: parameters, memory, operations and time of each stage.
No weights are loaded, only configurations; the model is run on the meta device.

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  device=NAME        cpu, or a GPU such as "RTX 4090", "A100 80GB", H100; this machine's if left out
  devices=N          how many of them train together (1); sharding=fsdp2 splits the model over them
  tokens=N           length of every caption; else the data is measured if it is here, or 16 assumed
  samples=N          captions in an epoch, where a stage is given by epochs and the data is not here
  measure=true       correct it by three real steps of each stage on this machine (random weights)
  --json             numbers for programs, in bytes, operations and hours
  key=value          overrides of the recipe, e.g. method=sa micro_batch_size=128
"""


def _truth(value: str) -> bool:
    return {"true": True, "false": False}[value.lower()]


_OWN: dict[str, Callable[[str], Any]] = {
    "device": str,
    "devices": int,
    "tokens": float,
    "samples": int,
    "measure": _truth,
}


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.training.recipes import load_recipe, recipe_names

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(recipes=", ".join(recipe_names())))
        return
    import json
    import warnings

    from rich.console import Console

    from hive_vision.reporting.plan_tables import plan_report
    from hive_vision.studies.plan import make_plan

    as_json = "--json" in arguments
    recipe, *overrides = [argument for argument in arguments if argument != "--json"]
    own, rest = {}, []
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        if key not in _OWN:
            rest.append(override)
            continue
        try:
            own[key] = _OWN[key](value)
        except (ValueError, KeyError) as error:
            form = "true or false" if key == "measure" else f"a number, e.g. {key}=8"
            raise ValueError(f"{key} is {value!r}; give {form}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers will change
        plan = make_plan(load_recipe(recipe, rest), **own)
    if as_json:
        sys.stdout.write(json.dumps(plan, indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for part in plan_report(plan):
        console.print(part)
