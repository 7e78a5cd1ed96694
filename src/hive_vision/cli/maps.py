"""hive-vision maps: gradient maps, attention maps, and the numbers behind them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hive_vision.studies.maps import MapsArguments

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
    from hive_vision.studies.maps import MapsArguments

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        sys.stdout.write(settings_parser(MapsArguments).format_help().partition("\n\n")[2])
        return
    from hive_vision.cli.reports import show_report
    from hive_vision.reporting.map_report import MapStyle, check_output, write_maps
    from hive_vision.reporting.map_tables import flow_grid, pointing_grid
    from hive_vision.studies.maps import look_inside

    models, output, settings = parse(arguments)
    check_output(output)
    found = look_inside(models, settings)
    style = MapStyle(settings.heads, settings.tokens, settings.layers, settings.scale)
    results = write_maps(found, output, style)
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

    from hive_vision.settings import read_settings
    from hive_vision.studies.maps import MapsArguments

    keys = {field.name for field in fields(MapsArguments)}
    models: dict[str, str] = {}
    output, options = "runs/maps", []
    for word in arguments:
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key == "output":
            output = value
        elif equals and key in keys:
            options.append(f"{key}={value}")
        elif word.startswith("--"):
            raise ValueError(f"maps: unknown option {word!r}; see hive-vision maps --help")
        else:
            named = bool(equals) and not Path(word).exists()
            name, folder = (key, value) if named else (Path(word).name, word)
            if not Path(folder).is_dir():
                raise ValueError(f"maps: {folder!r} is no folder; give run folders, or key=value")
            if "/" in name:
                raise ValueError(f"maps: NAME is {name!r}; files are called by it, so leave out /")
            if name in models:
                raise ValueError(f"maps: two models are called {name!r}; write NAME=RUN")
            models[name] = folder
    if not models:
        raise ValueError("maps: no model given; give run folders, see hive-vision maps --help")
    return models, Path(output), read_settings(MapsArguments, options, what="maps")
