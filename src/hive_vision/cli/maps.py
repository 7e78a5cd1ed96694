"""hive-vision maps: gradient maps, attention maps, and the numbers behind them."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hive_vision.cli.reports import check_output, show_report
from hive_vision.naming import unknown_name

if TYPE_CHECKING:
    from hive_vision.studies.map_arguments import MapsArguments

HELP = """\
usage: hive-vision maps [NAME=]RUN ... [output=FOLDER] [key=value ...]

Look inside of trained models: where the caption's loss reaches each encoder layer, where words
look, and both in numbers over a data set. Several models stand side by side on the same images.

  hive-vision maps runs/miniature-hive runs/miniature-sa
  hive-vision maps runs/miniature-hive image=photo.jpg caption="a dog on a sofa" tokens=dog,sofa
  hive-vision maps hive=runs/a cascaded=runs/b data=runs/miniature/data/captions/validation \\
      masks=runs/miniature/data/masks/validation

  RUN                a run folder of hive-vision pretrain or finetune, or a model's folder; a run of
                     method base is compared as an encoder only
  output=FOLDER      figures (PNG, SVG), arrays (npz), results.json, table.md (runs/maps)

"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.settings import settings_parser
    from hive_vision.studies.map_arguments import MapsArguments

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        sys.stdout.write(settings_parser(MapsArguments).format_help().partition("\n\n")[2])
        return
    models, output, settings = parse(arguments)  # before the imports, which take seconds
    check_output(output, "maps")
    from hive_vision.reporting.map_report import write_maps
    from hive_vision.reporting.map_tables import flow_grid, pointing_grid
    from hive_vision.studies.maps import look_inside, map_style

    found = look_inside(models, settings)
    results = write_maps(found, output, map_style(settings))
    tables = [table for table in (flow_grid(found), pointing_grid(found)) if table is not None]
    notes = [f"{title}: {note}" for title, _, note in tables]
    show_report(("\n\n".join([*notes, *results["sentences"]]), [g for _, g, _ in tables]), output)


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], Path, "MapsArguments"]:
    """Read a command line.

    Returns:
        Models by name, the output folder, and what to look at.

    Raises:
        ValueError: If it is none.
    """
    from dataclasses import fields

    from hive_vision.studies.map_arguments import MapsArguments

    keys = {"output", *(field.name for field in fields(MapsArguments))}
    models: dict[str, str] = {}
    options = {"output": "runs/maps"}
    for number, word in enumerate(arguments):
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key in keys:
            options[key] = value
        elif word.startswith("--") and key in keys:
            (value, *_) = [*arguments[number + 1 : number + 2], "..."]
            raise ValueError(f'maps: {word} needs its value in the same word: {key}="{value}"')
        elif word.startswith("--"):
            raise ValueError(f"maps: {unknown_name('option', key, keys)}")
        else:
            named = bool(equals) and not Path(word).exists()
            name, folder = (key, value) if named else (Path(word).name, word)
            if not Path(folder).is_dir():
                hint = f" ({unknown_name('key', key, keys)})" if named else ""
                raise ValueError(
                    f"maps: {folder!r} is no folder; give run folders, NAME=RUN, or key=value{hint}"
                )
            if "/" in name:
                raise ValueError(f"maps: NAME is {name!r}; files are called by it, so leave out /")
            if name in models:
                raise ValueError(f"maps: two models are called {name!r}; write NAME=RUN")
            models[name] = folder
    if not models:
        raise ValueError("maps: no model given; give run folders, see hive-vision maps --help")
    output = Path(options.pop("output"))
    return models, output, _read(options)


def _read(options: Mapping[str, str]) -> "MapsArguments":
    from hive_vision.settings import read_settings
    from hive_vision.studies.map_arguments import CHOICES, MapsArguments

    try:
        words = [f"{key}={value}" for key, value in options.items()]
        return read_settings(MapsArguments, words, what="maps")
    except ValueError as error:
        for key in options:
            if key in CHOICES and f'"{key}"' in str(error):
                raise ValueError(
                    f"maps: {key} is {options[key]!r}; allowed are {CHOICES[key]}"
                ) from error
        raise
