"""hive-vision export: a trained encoder as a plain folder, inside its CLIP, or half-way back."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELP = """\
usage: hive-vision export ENCODER --output FOLDER [--into FULL_MODEL]
                          [--interpolate ALPHA [--base BASE]]

Write a trained encoder into a folder that transformers alone reads:
AutoModel.from_pretrained("FOLDER"). What was written is read back and compared before it is there.

  hive-vision export runs/x --output clip-x --into openai/clip-vit-large-patch14-336
  hive-vision export runs/x/stage2/model --output after-stage2
  hive-vision export runs/x --output half --interpolate 0.5

  ENCODER            what was trained: a run folder, the model folder of one of its stages, an
                     encoder folder, or a hub id
  --output FOLDER    folder to make
  --into FULL_MODEL  put the encoder back into the whole CLIP or SigLIP that it came from, folder
                     or hub id: for zero-shot classification and retrieval. The text half stays as
                     it was and no longer matches exactly: measure zero-shot accuracy
  --interpolate ALPHA
                     take weights between those before training (0) and after it (1), for example
                     0.5: often keeps more of what the encoder could do before
  --base BASE        the encoder before training, folder or hub id; FULL_MODEL's if left out, else
                     what ENCODER's run says it started from
"""


class _Trained(NamedTuple):
    """An encoder, its image processor, and what its folder's manifest says."""

    model: "PreTrainedModel"
    image_processor: Any
    manifest: dict[str, Any]


def run(arguments: list[str]) -> None:
    """Run the command."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    options = _parse(arguments)
    output = Path(options.output)
    if output.exists():
        raise ValueError(
            f"--output {options.output!r} exists already: delete it or choose another folder"
        )
    from hive_vision.models.export import encoder_card, export_encoder
    from hive_vision.models.merging import (
        dual_encoder_card,
        export_dual_encoder,
        interpolate_encoders,
    )

    trained = _open(options.encoder)
    model, manifest = trained.model, trained.manifest
    summary = f"Exported from `{options.encoder}`."
    facts = _facts(manifest, options.encoder)
    if options.interpolate is not None:
        base, before = _open_base(options, manifest)
        model = interpolate_encoders(before, model, options.interpolate)
        facts |= {"base": base, "alpha": options.interpolate}
        summary = (
            f"Its weights lie between those of `{base}` and those of `{options.encoder}`: "
            "(1 - alpha) * before + alpha * after training, with alpha = "
            f"{options.interpolate:g}."
        )
    if options.into is None:
        started_from = manifest.get("vision") or options.base or options.encoder
        card = encoder_card(started_from, manifest.get("method"), summary)
        export_encoder(model, trained.image_processor, output, card, facts)
        sys.stdout.write(f"encoder: {output}\n")
        return
    card = dual_encoder_card(options.into, options.encoder, summary)
    facts["full_model"] = options.into
    export_dual_encoder(model, trained.image_processor, options.into, output, card, facts)
    sys.stdout.write(
        f"dual encoder: {output}\nits text half no longer matches the encoder exactly: measure "
        "zero-shot accuracy before you use it\n"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what the command line shows as one line."""
        raise ValueError(f"export: {message}; see hive-vision export --help")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--output", metavar="FOLDER", required=True)
    parser.add_argument("--into", metavar="FULL_MODEL")
    parser.add_argument("--interpolate", metavar="ALPHA", type=float)
    parser.add_argument("--base", metavar="BASE")
    options = parser.parse_args(arguments)
    alpha = options.interpolate
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(
            f"--interpolate is {alpha:g}; it must be from 0 (before training) to 1 (after it)"
        )
    if options.base is not None and alpha is None:
        raise ValueError("--base is used by --interpolate ALPHA only; give both or neither")
    return options


def _facts(manifest: dict[str, Any], encoder: str) -> dict[str, Any]:
    """What the manifest of the new folder says: all that the old one did, and where that is."""
    from importlib.metadata import version

    of_the_folder = ("format", "kind", "files")
    kept = {key: value for key, value in manifest.items() if key not in of_the_folder}
    return {**kept, "version": version("hive-vision"), "encoder": encoder}


def _open_base(
    options: argparse.Namespace, manifest: dict[str, Any]
) -> tuple[str, "PreTrainedModel"]:
    """Load the encoder before training, and say where it is.

    Raises:
        ValueError: If that is not known, or there is none.
    """
    from hive_vision.models.backbones import load_vision_model

    given = options.base or options.into
    if given is not None:
        return given, load_vision_model(given)
    recorded = manifest.get("vision")
    how = "give the encoder before training with --base FOLDER_OR_HUB_ID"
    if recorded is None:
        raise ValueError(f"{options.encoder!r} does not say what its training started from; {how}")
    try:
        return recorded, load_vision_model(recorded)
    except ValueError as error:
        raise ValueError(
            f"{options.encoder!r} started from {recorded!r}; {how} ({error})"
        ) from error


def _open(given: str) -> _Trained:
    """Load what was trained from a run, a stage, an encoder folder or the hub.

    Raises:
        ValueError: If there is no encoder.
    """
    from hive_vision.folders import check_folder
    from hive_vision.models.backbones import load_vision_model
    from hive_vision.models.processing import load_image_processor

    path = Path(given)
    if (path / "recipe.yaml").is_file():
        path = path / "encoder"
        if not path.is_dir():
            raise ValueError(
                f"run {given!r} has no encoder yet; finish it with the same pretrain command, or "
                "give the model folder of a finished stage, e.g. "
                f"{Path(given) / 'stage1' / 'model'}"
            )
    manifest = _manifest(path)
    kind = manifest.get("kind")
    if kind == "model":
        return _open_stage(path)
    if kind in ("encoder", "dual_encoder"):
        check_folder(path, kind)
    elif kind is not None:
        raise ValueError(
            f"{given!r} is a {kind} folder; give a run folder, a stage's model folder, an encoder "
            "folder or a hub id"
        )
    source = path if path.is_dir() else given
    return _Trained(load_vision_model(source), load_image_processor(source), manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest of ours; nothing where there is none, or a file of that name of others."""
    from hive_vision.folders import MANIFEST, read_json

    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _open_stage(path: Path) -> _Trained:
    from hive_vision.folders import check_folder
    from hive_vision.models.backbones import backbones_of
    from hive_vision.models.hive import HiveForConditionalGeneration
    from hive_vision.models.processing import load_image_processor
    from hive_vision.models.self_attention_baseline import SelfAttentionForConditionalGeneration
    from hive_vision.training.checkpoints import load_strictly

    manifest = check_folder(path, "model")
    sa = manifest["method"] == "sa"
    model_class = SelfAttentionForConditionalGeneration if sa else HiveForConditionalGeneration
    vision, _ = backbones_of(load_strictly(model_class, path))
    return _Trained(vision, load_image_processor(path), manifest)
