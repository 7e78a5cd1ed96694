"""hive-vision resume-test: proof that N + N steps are 2N steps."""

import sys

HELP = """\
usage: hive-vision resume-test RECIPE [steps=N] [key=value ...]

Prove, with your own recipe, models and data, that an interrupted run ends as an undisturbed one.
One run does 2N steps of every stage. Another is stopped after N steps of every stage, and each
time goes on in a new process. Then every weight and every logged loss of the two is compared.
Nothing of the recipe's own run is touched: the runs lie in a hidden folder beside its output,
which is deleted again if they are equal.

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  steps=N            steps before and after each stop (5)
  key=value          overrides of the recipe, e.g. method=sa data.train=FOLDER

Ends with 0 if everything is equal, bit for bit, and with 1 if not.
On GPUs some operations add in any order. If two undisturbed runs differ as well, it says so.
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.training.recipes import load_recipe, recipe_names

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(recipes=", ".join(recipe_names())))
        return
    from dataclasses import asdict

    from rich.console import Console

    from hive_vision.reporting.tables import resume_table
    from hive_vision.studies.resume_test import prove_resume

    recipe, *overrides = arguments
    steps, rest = 5, []
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        if key != "steps":
            rest.append(override)
        elif value.isdecimal():
            steps = int(value)
        else:
            raise ValueError(f"steps is {value!r}; give a number, e.g. steps=5")
    proof = prove_resume(load_recipe(recipe, rest), steps)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(resume_table([asdict(stage) for stage in proof.stages]))
    if proof.control:
        console.print("Two undisturbed runs:")
        console.print(resume_table([asdict(stage) for stage in proof.control]))
    sys.stdout.write(f"{proof.verdict}\n")
    if not proof.holds:
        sys.exit(1)
