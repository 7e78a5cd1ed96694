"""Typed settings from a YAML file with ``key=value`` overrides on top: recipes, probes, studies."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from hive_vision.naming import unknown_name

T = TypeVar("T")


def read_settings(
    kind: type[T], overrides: Sequence[str] = (), path: Path | None = None, what: str = "recipe"
) -> T:
    """Read settings into a dataclass.

    Args:
        kind: The dataclass.
        overrides: ``key=value`` strings such as ``stage1.max_steps=10``.
        path: YAML file that the overrides lie on; without one, on the dataclass's defaults.
        what: What the settings are, for messages.

    Raises:
        ValueError: If a key does not exist (the nearest is named) or a value does not fit.
    """
    flags = []
    if path is not None:
        check_keys(_read_yaml(path, what), kind, what)
        flags.append(f"--config={path}")
    for override in overrides:
        key, equals, value = override.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not an override; write key=value")
        check_keys(_nested(key, value), kind, what)
        flags.append(f"--{key}={_listed(value) if _is_list(kind, key) else value}")
    parser = settings_parser(kind)
    parser.add_argument("--config", action="config")
    # jsonargparse prints usage and exits on an error unless told otherwise.
    try:
        parsed = parser.parse_args(flags)
        arguments = parser.instantiate(parsed)
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from error
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: arguments[name] for name in names})


def settings_parser(kind: type) -> ArgumentParser:
    """Make the parser that types settings; its help lists every key."""
    parser = ArgumentParser(prog="hive-vision", exit_on_error=False, add_help=False)
    parser.add_class_arguments(kind, None)
    return parser


def check_keys(content: Mapping[str, Any], kind: type, what: str) -> None:
    """Refuse keys that settings do not have.

    Args:
        content: What was given.
        kind: The dataclass that it will become.
        what: What the settings are, for messages.

    Raises:
        ValueError: For the first unknown key; names the nearest one of all.
    """
    _check_keys(content, kind, "", what, list(_all_keys(kind)))


def _check_keys(
    content: Mapping[str, Any], kind: type, prefix: str, what: str, known: list[str]
) -> None:
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            given, nearby = f"{prefix}{key}", [prefix + name for name in hints]
            message = unknown_name(f"{what} key", given, nearby)
            if "did you mean" not in message:
                message = unknown_name(f"{what} key", given, known)
            raise ValueError(message)
        inner = _dataclass_of(hints[key])
        for item in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(item, Mapping):
                _check_keys(item, inner, f"{prefix}{key}.", what, known)


def _read_yaml(path: Path, what: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {str(path)!r} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a {what}: it should be a mapping of keys to values")
    return content


def _listed(value: str) -> str:
    """Let ``1,2`` stand for ``[1, 2]``; each item is text or what YAML makes of it."""
    if value.startswith("[") or value in ("null", ""):
        return value
    items = [yaml.safe_load(item) if item[:1] not in "{[" else item for item in value.split(",")]
    return json.dumps(items)


def _is_list(kind: type, key: str) -> bool:
    """Whether a key takes a list and nothing else."""
    first, _, rest = key.partition(".")
    hint = get_type_hints(kind).get(first)
    inner = _dataclass_of(hint)
    if rest:
        return inner is not None and _is_list(inner, rest)
    return get_origin(hint) in (list, tuple)


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
