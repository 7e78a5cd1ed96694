"""hive-vision demo: every method in miniature, side by side."""

import sys

HELP = """\
usage: hive-vision demo [--cascaded | --no-cascaded] [--output FOLDER] [--recipe RECIPE]

Draw the miniature data, train its small foundation models, pre-train an encoder with each method
(base, sa, cascaded, hive) in a process of its own, and print what they cost and how well a linear
head on the frozen encoders classifies; all of it goes into report.html too, with maps of what the
models look at. Run again after an interruption: what is done is not done again.

  --output FOLDER    where the runs go (runs/demo)
  --recipe RECIPE    what the runs do (demo)
  --no-cascaded      leave the cascaded baseline out, to save time
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    import argparse
    from pathlib import Path

    from rich.console import Console

    from hive_vision.folders import write_json
    from hive_vision.reporting.map_report import MapStyle, write_maps
    from hive_vision.reporting.probe_tables import probe_report, results_json
    from hive_vision.reporting.tables import method_table
    from hive_vision.studies.demo import look_into_demo, run_demo
    from hive_vision.studies.report import PAGE, write_report
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
    demo = run_demo(options.recipe, Path(options.output), recipe.miniature, methods)
    note, grids = probe_report(demo.accuracies)
    content = {"methods": demo.runs, "probe": results_json(demo.accuracies)}
    output = Path(options.output)
    write_json(output / "results.json", content)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(method_table(demo.runs))
    console.print(grids[0].to_rich())  # the differences are in results.json
    console.print(note)
    console.print(f"The pre-trained encoder: {demo.runs[-1]['encoder']}", soft_wrap=True)
    inside = look_into_demo(output, recipe.miniature, methods)
    write_maps(inside, output / "maps", MapStyle())
    write_report([output], output)
    console.print(f"The report: {output / PAGE}", soft_wrap=True)
