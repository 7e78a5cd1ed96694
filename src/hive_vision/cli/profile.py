"""hive-vision profile: what a recipe costs on this machine, method beside method."""

import sys

HELP = """\
usage: hive-vision profile RECIPE [methods=LIST] [stages=LIST] [batch=N] [tokens=N]
                           [repetitions=N] [scaling=BOOL] [output=FOLDER] [key=value ...]

Count what a recipe's training steps need, and time them here with random weights: operations of
each component, seconds, memory, and hive against sa as the paper's Tables 6 to 9 have it. No
weights are loaded; the backbones' configurations are enough.

  hive-vision profile miniature
  hive-vision profile paper-siglip-l16-384 batch=2 methods=sa,hive repetitions=1

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  methods=LIST       of sa, hive, cascaded (all)
  stages=LIST        of stage1, stage2, stage3 (all that the recipe has)
  batch=N            captions at once (the recipe's micro_batch_size)
  tokens=N           length of every caption; else the data is measured if it is here, or 16 assumed
  repetitions=N      turns in which every case is measured (3); 0 only counts
  scaling=BOOL       also count other resolutions and text lengths (true)
  output=FOLDER      results.json, table.md, scaling.png and .svg (runs/profile)
  key=value          overrides of the recipe, e.g. precision=float32 compile=true
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.training.recipes import load_recipe, recipe_names

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(recipes=", ".join(recipe_names())))
        return
    import logging
    import warnings
    from dataclasses import fields
    from pathlib import Path

    from hive_vision.cli.reports import check_output, show_report
    from hive_vision.folders import write_json
    from hive_vision.reporting.figures import save_figure
    from hive_vision.reporting.profile_tables import profile_report, scaling_figure
    from hive_vision.settings import read_settings
    from hive_vision.studies.profile import ProfileArguments, profile

    own = {field.name for field in fields(ProfileArguments)}
    output = "runs/profile"
    options: list[str] = []
    overrides: list[str] = []
    recipe, *rest = arguments
    for word in rest:
        key, _, value = word.removeprefix("--").partition("=")
        if key == "output":
            output = value
        else:
            (options if key in own else overrides).append(word)
    check_output(Path(output))
    given = load_recipe(recipe, [*overrides, f"output={output}"])
    settings = read_settings(ProfileArguments, options, what="profile")
    logging.getLogger("hive_vision").setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers will change
        found = profile(given, settings)
    Path(output).mkdir(parents=True, exist_ok=True)
    write_json(Path(output) / "results.json", found)
    if found["scaling"]:
        save_figure(scaling_figure(found), Path(output) / "scaling")
    show_report(profile_report(found), Path(output))
