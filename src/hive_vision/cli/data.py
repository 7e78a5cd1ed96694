"""hive-vision data: build shards, find what cannot be used, show samples, measure the loader."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

from hive_vision.naming import unknown_name

HELP = """\
usage: hive-vision data build SOURCE OUTPUT [key=value ...]
       hive-vision data verify RECIPE [key=value ...]
       hive-vision data show RECIPE [key=value ...]
       hive-vision data bench RECIPE [key=value ...]

  build     write captioned images of any format into shards that start and load fast
  verify    decode everything once; list what cannot be used; summary of the data
  show      print samples as the trainer sees them, supervised tokens coloured
  bench     measure the loader against what the training steps take

Each has its own help, e.g. hive-vision data build --help
"""

BUILD_HELP = """\
usage: hive-vision data build SOURCE OUTPUT [key=value ...]

Write captioned images into shards, checked and, if asked, resized, in several processes. Images
that cannot be read are left out and named with the reason in OUTPUT/quarantine.jsonl. Run the same
command again after an interruption: finished shards are not written again. The result is the
same, byte for byte, with any number of workers. Train on it with data.train=OUTPUT.

  hive-vision data build photos built/photos resize=384
  hive-vision data build chat.json built/cc3m images=images workers=8

  SOURCE             image folder with metadata, json file of LLaVA or COCO, tar shards, folder
                     that the datasets library reads, or a hub id
  OUTPUT             folder to make
"""

VERIFY_HELP = """\
usage: hive-vision data verify RECIPE [key=value ...]

Decode every image of a recipe's data, held-out data included, in several processes. Writes what
cannot be used, with the reason, into a file that a run takes as data.quarantine=FILE, and a
summary beside it: image sizes, caption lengths in the recipe's tokenizer, how many are cut,
duplicates. Bad samples are no failure: the exit code is 0.

  hive-vision data verify miniature data.train=photos data.validation=null

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  quarantine=FILE    file to write (OUTPUT.quarantine.jsonl, OUTPUT being the recipe's run folder)
  workers=NUMBER     processes (one for each processor)
  key=value          other recipe keys, as for hive-vision pretrain
"""

SHOW_HELP = """\
usage: hive-vision data show RECIPE [key=value ...]

Print the first samples of a run exactly as the trainer sees them: the same order, processor and
batches. Tokens that are learned are green, all others dim; padding is <pad> and the like. Without
colours, learned tokens stand in [brackets].

  hive-vision data show debug method=sa samples=4
  hive-vision data show vlm-miniature stage=stage2

  RECIPE             a recipe of the package ({recipes}),
                     one of hive-vision finetune, or a YAML file
  samples=NUMBER     how many (8)
  stage=STAGE        of which stage (the first that has steps to do)
  key=value          other recipe keys, as for hive-vision pretrain or finetune
"""

BENCH_HELP = """\
usage: hive-vision data bench RECIPE [key=value ...]

Say whether training waits for its data. Reads batches as a run does, with 0, 1, 2, 4 ... workers up
to the number of processors, and sets that against what each stage takes: as measured, if the
recipe's output folder has a run with finished stages, else (pre-training only) as hive-vision plan
expects it.

  hive-vision data bench paper-siglip-l16-384 device="H100" seconds=10

  RECIPE             a recipe of the package ({recipes}),
                     one of hive-vision finetune, or a YAML file
  stage=STAGE        data and batches of which stage (the first that has steps to do)
  seconds=NUMBER     how long to read with each number of workers (5)
  device=NAME        device that will train, as for hive-vision plan (this machine's)
  key=value          other recipe keys, as for hive-vision pretrain or finetune
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    actions = {
        "build": (_build, _build_help),
        "verify": (_verify, lambda: _recipe_help(VERIFY_HELP)),
        "show": (_show, lambda: _recipe_help(SHOW_HELP)),
        "bench": (_bench, lambda: _recipe_help(BENCH_HELP)),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    name, *rest = arguments
    if name not in actions:
        raise ValueError(unknown_name("data command", name, actions))
    action, describe = actions[name]
    if not rest or {"-h", "--help"} & set(rest):
        sys.stdout.write(describe())
        return
    action(rest)


def _build(arguments: list[str]) -> None:
    from hive_vision.data.build import BuildSettings, build_data
    from hive_vision.data.sources import Source, choose_split, open_source

    positions = [argument for argument in arguments if "=" not in argument]
    if len(positions) != 2:
        raise ValueError(
            f"data build takes a SOURCE and an OUTPUT, then key=value; given: {' '.join(arguments)}"
        )
    path, output = positions
    values = _parse([argument for argument in arguments if "=" in argument])
    of_settings = {field.name for field in dataclasses.fields(BuildSettings)}
    settings = BuildSettings(**{key: values.pop(key) for key in of_settings})
    source = Source(path=path, **values)
    if Path(output).resolve().is_relative_to(Path(path).resolve()):
        raise ValueError(f"OUTPUT {output!r} is inside SOURCE {path!r}; choose a folder beside it")
    splits = open_source(source)
    chosen = choose_split(splits, source.split or "train", path)
    others = [name for name, split in splits.items() if split is not chosen]
    manifest = build_data(chosen, Path(output), settings)
    left_out = f"; {manifest['unusable']:,} left out, see {output}/quarantine.jsonl"
    sys.stdout.write(
        f"{output}: {manifest['images']:,} images, {manifest['captions']:,} captions in "
        f"{len(manifest['shards']):,} shards{left_out if manifest['unusable'] else ''}\n"
        f"train on it with data.train={output}\n"
    )
    if others:
        sys.stdout.write(f"not built: other splits ({', '.join(others)}), see split=\n")


def _build_help() -> str:
    keys = _build_parser().format_help().partition("\n\n")[2]
    return f"{BUILD_HELP}\n{keys}"


def _build_parser() -> Any:
    from jsonargparse import ArgumentParser

    from hive_vision.data.build import BuildSettings
    from hive_vision.data.sources import Source

    parser = ArgumentParser(prog="hive-vision data build", exit_on_error=False, add_help=False)
    parser.add_class_arguments(BuildSettings, None)
    parser.add_class_arguments(Source, None, skip={"path", "weight"})
    return parser


def _parse(overrides: list[str]) -> dict[str, Any]:
    """Type the keys of ``data build``."""
    parser = _build_parser()
    known = list(vars(parser.get_defaults()))
    flags = [f"--{override.removeprefix('--')}" for override in overrides]
    for flag in flags:
        key = flag.removeprefix("--").partition("=")[0]
        if key not in known:
            raise ValueError(unknown_name("key of data build", key, known))
    try:
        return dict(vars(parser.parse_args(flags)))
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from error


def _recipe_help(text: str) -> str:
    from hive_vision.training.recipes import recipe_names

    return text.format(recipes=", ".join(recipe_names()))


def _verify(arguments: list[str]) -> None:
    from rich.console import Console

    from hive_vision.data.parallel import processors
    from hive_vision.reporting.data_checks import data_table, problem_lines
    from hive_vision.studies.data_checks import verify_data
    from hive_vision.training.recipes import load_recipe

    recipe, *overrides = arguments
    workers = _take_number(overrides, "workers", processors())
    file = _take(overrides, "quarantine")
    settings = load_recipe(recipe, overrides)
    quarantine = Path(file or f"{settings.output.rstrip('/')}.quarantine.jsonl")
    summary = verify_data(settings, quarantine, workers)
    console = Console(highlight=False, soft_wrap=True)
    console.print(data_table(summary))
    problems = summary["problems"]
    lines = ["everything can be used"]
    if problems:
        lines = [f"{len(problems):,} cannot be used:", *problem_lines(problems)]
        lines.append(f"leave them out of a run with data.quarantine={quarantine}")
    lines.append(f"summary: {quarantine.with_suffix('.json')}")
    for line in lines:
        console.print(line, markup=False)


def _show(arguments: list[str]) -> None:
    from rich.console import Console

    from hive_vision.reporting.data_checks import share_line, token_line
    from hive_vision.studies.data_checks import first_batches
    from hive_vision.training.recipes import load_any_recipe

    recipe, *overrides = arguments
    count, stage = _take_number(overrides, "samples", 8), _take(overrides, "stage")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    colour = console.color_system is not None and not console.no_color
    everything = []
    for batch in first_batches(load_any_recipe(recipe, overrides), count, stage):
        shape = " x ".join(map(str, batch.pixel_values))
        console.print(f"micro-batch: images {shape}", style="bold", markup=False)
        for sample in batch.samples:
            everything += sample.tokens
            sizes = [f"{width} x {height}" for width, height in sample.sizes]
            pixels = f"{', '.join(sizes)} pixels" if sizes else "no image"
            console.print(f"\nsample {sample.number}  {sample.source}  {pixels}", markup=False)
            for replaced in sample.replaces:
                console.print(f"  in place of {replaced}", markup=False, style="yellow")
            console.print(token_line(sample.tokens, colour))
            console.print(f"  {share_line(sample.tokens)}", style="dim", markup=False)
        console.print()
    learned = "green" if colour else "in [brackets]"
    console.print(f"all shown: {share_line(everything)}", markup=False)
    console.print(f"learned tokens are {learned}", markup=False)


def _bench(arguments: list[str]) -> None:
    from rich.console import Console

    from hive_vision.reporting.data_checks import speed_lines, speed_table
    from hive_vision.studies.data_bench import SECONDS, bench_data
    from hive_vision.training.recipes import load_any_recipe

    recipe, *overrides = arguments
    stage, device = _take(overrides, "stage"), _take(overrides, "device")
    seconds = _take_number(overrides, "seconds", SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers will change
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than processors
        bench = bench_data(load_any_recipe(recipe, overrides), stage, seconds, device)
    console = Console(highlight=False, soft_wrap=True)
    console.print(speed_table(bench))
    for line in speed_lines(bench):
        console.print(line, markup=False)


def _take(overrides: list[str], key: str) -> str | None:
    """Take an option of the command from among the overrides of the recipe."""
    values = [override for override in overrides if override.startswith(f"{key}=")]
    for override in values:
        overrides.remove(override)
    return values[-1].partition("=")[2] if values else None


def _take_number(overrides: list[str], key: str, default: int) -> int:
    value = _take(overrides, key)
    if value is None:
        return default
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} is {value!r}; give a whole number from 1")
    return int(value)
