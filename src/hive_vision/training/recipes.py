"""Reading recipes: YAML files with ``key=value`` overrides on top."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from hive_vision.naming import unknown_name
from hive_vision.training.arguments import PretrainArguments


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("hive_vision.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def recipe_path(recipe: str | Path) -> Path:
    """Find a recipe: a YAML file, or the name of one that comes with the package.

    Raises:
        ValueError: If there is neither.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in recipe_names():
        return Path(str(files("hive_vision.recipes") / f"{recipe}.yaml"))
    if Path(recipe).suffix in (".yaml", ".yml"):
        names = ", ".join(recipe_names())
        raise ValueError(f"recipe {str(recipe)!r} does not exist; the package has {names}")
    raise ValueError(
        unknown_name("recipe", str(recipe), recipe_names()) + " (or give the path of a YAML file)"
    )


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> PretrainArguments:
    """Read a pre-training recipe.

    Args:
        recipe: Name of a recipe of the package, or a YAML file.
        overrides: ``key=value`` strings such as ``stage1.max_steps=10``.

    Raises:
        ValueError: If a key does not exist (the nearest is named) or a value does not fit.
    """
    path = recipe_path(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a recipe: it should be a mapping of keys to values")
    check_keys(content, PretrainArguments)
    flags = []
    for override in overrides:
        key, equals, value = override.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not an override; write key=value")
        check_keys(_nested(key, value), PretrainArguments)
        flags.append(f"--{key}={value}")
    parser = recipe_parser()
    parser.add_argument("--config", action="config")
    # jsonargparse prints usage and exits on an error unless told otherwise.
    try:
        parsed = parser.parse_args([f"--config={path}", *flags])
        arguments = parser.instantiate(parsed)
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from error
    values = {field.name: arguments[field.name] for field in dataclasses.fields(PretrainArguments)}
    return PretrainArguments(**values)


def recipe_parser() -> ArgumentParser:
    """Make the parser that types a recipe; its help lists every key."""
    parser = ArgumentParser(prog="hive-vision pretrain RECIPE", exit_on_error=False, add_help=False)
    parser.add_class_arguments(PretrainArguments, None)
    return parser


def check_keys(content: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """Refuse keys that a recipe does not have.

    Args:
        content: Part of a recipe.
        kind: The dataclass that it will become.
        prefix: Keys above, each with a dot.

    Raises:
        ValueError: For the first unknown key; names the nearest one of the whole recipe.
    """
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            known = list(_all_keys(PretrainArguments))
            nearby = [prefix + name for name in hints]
            given = f"{prefix}{key}"
            message = unknown_name("recipe key", given, nearby)
            if "did you mean" not in message:
                message = unknown_name("recipe key", given, known)
            raise ValueError(message)
        inner = _dataclass_of(hints[key])
        for item in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(item, Mapping):
                check_keys(item, inner, f"{prefix}{key}.")


def _all_keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(kind).items():
        inner = _dataclass_of(hint)
        keys += [prefix + name] if inner is None else _all_keys(inner, f"{prefix}{name}.")
    return keys


def _dataclass_of(hint: Any) -> type | None:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = [option for option in options if dataclasses.is_dataclass(option)]
    return found[0] if found and isinstance(found[0], type) else None


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}
