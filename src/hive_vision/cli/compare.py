"""hive-vision compare: methods against each other, end to end, over seeds."""

import sys

from hive_vision.cli.reports import show_report

HELP = """\
usage: hive-vision compare STUDY.yaml [key=value ...]

Which method makes the better encoder? Pre-train with each method and several seeds, probe every
encoder, and print accuracies with their spread and differences with a 95% interval. Before that,
learning rates and stage lengths can be searched for each method: the same candidates, judged on
images that no result is measured on. Takes hours; stop it at will, the same command goes on.

  STUDY.yaml         recipe, output, data (classification sets) and the keys below
  key=value          overrides, e.g. seeds=0,1,2 jobs=2

"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from pathlib import Path

    from hive_vision.settings import read_settings, settings_parser
    from hive_vision.studies.compare import CompareArguments, compare_methods

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        sys.stdout.write(settings_parser(CompareArguments).format_help().partition("\n\n")[2])
        return
    from hive_vision.reporting.figures import layer_figure, save_figure
    from hive_vision.reporting.probe_tables import (
        layer_report,
        probe_report,
        search_grid,
    )

    path, *overrides = arguments
    if not Path(path).is_file():
        raise ValueError(f"study {path!r} does not exist; give a YAML file")
    settings = read_settings(CompareArguments, overrides, Path(path), "study")
    found = compare_methods(settings)
    output = Path(settings.output)
    note, grids = probe_report(found.results)
    if found.layers:
        layer_note, layer_grids = layer_report(found.layers)
        grids += layer_grids
        accuracies = {
            name: {label: [result.accuracy for result in layers] for label, layers in by.items()}
            for name, by in found.layers.items()
        }
        save_figure(layer_figure(accuracies, layer_note.partition(". ")[0]), output / "layers")
    if found.search:
        grids.append(search_grid(found.search))
    show_report((note, grids), output)
