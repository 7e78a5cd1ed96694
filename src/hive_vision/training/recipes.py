"""Reading recipes: YAML files with ``key=value`` overrides on top."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from hive_vision.naming import unknown_name
from hive_vision.settings import read_settings
from hive_vision.training.arguments import FinetuneArguments, PretrainArguments

PRETRAIN, FINETUNE = "hive_vision.recipes", "hive_vision.recipes.finetune"


def recipe_names(package: str = PRETRAIN) -> list[str]:
    """Names of the recipes that come with the package.

    Args:
        package: Where they are: those of pre-training or those of fine-tuning.
    """
    folder = files(package)
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def recipe_path(recipe: str | Path, package: str = PRETRAIN) -> Path:
    """Find a recipe: a YAML file, or the name of one that comes with the package.

    Raises:
        ValueError: If there is neither.
    """
    known = recipe_names(package)
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in known:
        return Path(str(files(package) / f"{recipe}.yaml"))
    if Path(recipe).suffix in (".yaml", ".yml"):
        raise ValueError(
            f"recipe {str(recipe)!r} does not exist; the package has {', '.join(known)}"
        )
    for other, command in ((PRETRAIN, "pretrain"), (FINETUNE, "finetune")):
        if str(recipe) in recipe_names(other):
            raise ValueError(
                f"{str(recipe)!r} is a recipe of hive-vision {command}; here are allowed "
                f"{', '.join(known)} (or give the path of a YAML file)"
            )
    raise ValueError(
        unknown_name("recipe", str(recipe), known) + " (or give the path of a YAML file)"
    )


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> PretrainArguments:
    """Read a pre-training recipe.

    Args:
        recipe: Name of a recipe of the package, or a YAML file.
        overrides: ``key=value`` strings such as ``stage1.max_steps=10``.

    Raises:
        ValueError: If a key does not exist (the nearest is named) or a value does not fit.
    """
    return read_settings(PretrainArguments, overrides, recipe_path(recipe))


def load_finetune_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> FinetuneArguments:
    """Read a recipe of fine-tuning, as ``load_recipe`` does those of pre-training."""
    return read_settings(FinetuneArguments, overrides, recipe_path(recipe, FINETUNE))


def load_any_recipe(
    recipe: str | Path, overrides: Sequence[str] = ()
) -> PretrainArguments | FinetuneArguments:
    """Read a recipe of either kind: one of fine-tuning has data for each stage.

    Args:
        recipe: Name of a recipe of the package, or a YAML file.
        overrides: As for ``load_recipe``.

    Raises:
        ValueError: As ``load_recipe``.
    """
    if str(recipe) in recipe_names(FINETUNE):
        return load_finetune_recipe(recipe, overrides)
    path = recipe_path(recipe)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        is_finetuning = bool({"stage1", "stage2"} & set(data))
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        is_finetuning = False  # whatever is wrong with it, the reader says
    return (load_finetune_recipe if is_finetuning else load_recipe)(recipe, overrides)
