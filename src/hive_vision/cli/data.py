"""hive-vision data: build shards, verify what cannot be used, show what a model is given."""

import sys
from pathlib import Path
from typing import Any

from hive_vision.naming import unknown_name

HELP = """\
usage: hive-vision data build SOURCE OUTPUT [key=value ...]
       hive-vision data verify RECIPE [key=value ...]
       hive-vision data show RECIPE [key=value ...]

  build     write captioned images of any format into shards that start and load fast
  verify    decode everything once; list what cannot be used; summary of the data
  show      print samples as the trainer sees them, supervised tokens coloured

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

  RECIPE             a recipe of the package ({recipes}) or a YAML file
  samples=NUMBER     how many (8)
  key=value          other recipe keys, as for hive-vision pretrain
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    actions = {
        "build": (_build, _build_help),
        "verify": (_verify, lambda: _recipe_help(VERIFY_HELP)),
        "show": (_show, lambda: _recipe_help(SHOW_HELP)),
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
    settings = BuildSettings(**{key: values.pop(key) for key in _fields(BuildSettings)})
    source = Source(path=path, **values)
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


def _fields(kind: type) -> list[str]:
    import dataclasses

    return [field.name for field in dataclasses.fields(kind)]


def _parse(overrides: list[str]) -> dict[str, Any]:
    """Type the keys of ``data build``."""
    from hive_vision.data.build import BuildSettings
    from hive_vision.data.sources import Source

    known = [*_fields(BuildSettings), *_fields(Source)]
    known = [key for key in known if key not in ("path", "weight")]
    for override in overrides:
        key = override.removeprefix("--").partition("=")[0]
        if key not in known:
            raise ValueError(unknown_name("key of data build", key, known))
    parser = _build_parser()
    try:
        parsed = parser.parse_args([f"--{override.removeprefix('--')}" for override in overrides])
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {key: parsed[key] for key in known}


def _recipe_help(text: str) -> str:
    from hive_vision.training.recipes import recipe_names

    return text.format(recipes=", ".join(recipe_names()))


def _verify(arguments: list[str]) -> None:
    raise ValueError("not yet")


def _show(arguments: list[str]) -> None:
    raise ValueError("not yet")
