"""hive-vision probe: classification with the encoder frozen."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hive_vision.cli.reports import check_output, show_report

if TYPE_CHECKING:
    from hive_vision.evaluation.arguments import ProbeArguments
    from hive_vision.evaluation.probe import ProbeResult

    # Set -> line of its figure -> results along it.
    Curves: TypeAlias = Mapping[str, Mapping[str, Sequence[ProbeResult]]]

HELP = """\
usage: hive-vision probe ENCODER data=SET[,SET...] [output=FOLDER] [key=value ...]
       hive-vision probe --compare NAME=ENCODER NAME=ENCODER ... data=SET[,SET...]
       hive-vision probe --layers NAME=ENCODER ... data=SET[,SET...]
       hive-vision probe --interpolate ENCODER base=FULL_MODEL data=SET[,SET...] [alphas=0,0.5,1]

Is an encoder better? It is frozen, and a small head on it learns to classify images. Accuracies
come with their spread, differences between encoders with a 95% interval.

  ENCODER            a run folder, encoder folder, or hub id; of CLIP or SigLIP the vision half
  data=SET           {sets}; NAME:FOLDER
                     for a local copy; or any folder with a folder for each class, or hub id
  --compare          several encoders side by side; the best is bold where the intervals say so
  --layers           the accuracy of every layer, as a figure
  --interpolate      encoders between a base and a trained one: probe and zero-shot accuracy, as a
                     figure; base is the whole CLIP or SigLIP that the encoder came from
  output=FOLDER      results.json, table.md and figures go there (runs/probe)

The seconds-fast default trains a linear head on features that are computed once and kept;
protocol=paper is the paper's Table 4, with augmentation, and takes hours on large sets.

"""

_MODES = ("--compare", "--layers", "--interpolate")
_ALPHAS = "0,0.25,0.5,0.75,1"


def run(arguments: list[str]) -> None:
    """Run the command."""
    from hive_vision.data.classification import KNOWN_SETS
    from hive_vision.evaluation.arguments import ProbeArguments
    from hive_vision.settings import settings_parser

    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP.format(sets=", ".join(KNOWN_SETS)))
        sys.stdout.write(settings_parser(ProbeArguments).format_help().partition("\n\n")[2])
        return
    mode, own, encoders, probe = parse(arguments)
    output = Path(own.get("output", "runs/probe"))
    check_output(output)
    sets = [name for name in own["data"].split(",") if name]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # now, not after the hours that it may take
        raise ValueError(f"output {str(output)!r} cannot be a folder ({error.strerror})") from error
    if mode == "--interpolate":
        _interpolate(encoders, sets, probe, output, own.get("alphas", _ALPHAS))
    elif mode == "--layers":
        _layers(_named(encoders), sets, probe, output)
    else:
        _compare(_named(encoders), sets, probe, output)


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, str], list[str], "ProbeArguments"]:
    """Read a command line.

    Returns:
        The mode, if one was given; data, output and alphas as they were given; encoders; and the
        settings of the probe.

    Raises:
        ValueError: If it is none.
    """
    from hive_vision.evaluation.arguments import ProbeArguments
    from hive_vision.naming import unknown_name
    from hive_vision.settings import read_settings

    modes = [argument for argument in arguments if argument in _MODES]
    if len(modes) > 1:
        raise ValueError(f"probe: give one of {' and '.join(modes)}")
    own, encoders, settings = _sort([word for word in arguments if word not in _MODES])
    if not own.get("data"):
        raise ValueError("probe: no classification set given; add data=cifar10, or data=FOLDER")
    unknown = [encoder.partition("=")[0] for encoder in encoders if "=" in encoder]
    if not modes and len(encoders) > 1 and unknown:
        raise ValueError(unknown_name("key of probe", unknown[0], _keys()))
    if not modes and len(encoders) != 1:
        raise ValueError(f"probe: give one encoder, or --compare; got {len(encoders)}")
    probe = read_settings(ProbeArguments, settings, what="probe")
    if "alphas" in own and modes != ["--interpolate"]:
        raise ValueError("probe: alphas is for --interpolate; leave it out")
    if modes == ["--layers"] and probe.layer != "last":
        raise ValueError(f"probe: layer is {probe.layer} but --layers probes all; leave it out")
    return "".join(modes), own, encoders, probe


def _sort(rest: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Tell the command's own options, encoders, and settings of the probe apart.

    What has no ``=``, or a name before it that is no setting, is an encoder.
    """
    keys = _keys()
    own: dict[str, str] = {}
    encoders, settings = [], []
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        if Path(argument).exists():
            encoders.append(argument)
        elif equals and key in ("data", "output", "alphas"):
            own[key] = value
        elif equals and key.partition(".")[0] in keys:
            settings.append(f"{key}={value}")
        elif argument.startswith("--") and key in keys:
            raise ValueError(f"probe: write {key}=VALUE")
        elif argument.startswith("-"):
            raise ValueError(f"probe: unknown option {argument!r}; see hive-vision probe --help")
        else:
            encoders.append(argument)
    return own, encoders, settings


def _keys() -> list[str]:
    from dataclasses import fields

    from hive_vision.evaluation.arguments import ProbeArguments

    return [field.name for field in fields(ProbeArguments)]


def _named(encoders: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=ENCODER``; an encoder without a name is called as its folder."""
    named: dict[str, str] = {}
    for encoder in encoders:
        name, equals, source = encoder.partition("=")
        if not equals or Path(encoder).exists():
            name, source = _short_name(encoder), encoder
        if not source:
            raise ValueError(f"probe: {encoder!r} names no encoder; write NAME=FOLDER")
        if name in named:
            raise ValueError(f"probe: two encoders are called {name!r}; write NAME=ENCODER")
        named[name] = _encoder_folder(source)
    if not named:
        raise ValueError("probe: no encoder given; add a folder or a hub id, or NAME=FOLDER")
    return named


def _encoder_folder(given: str) -> str:
    """Take a run's encoder where the run is given."""
    inside = Path(given) / "encoder"
    return str(inside) if (inside / "config.json").is_file() else given


def _short_name(encoder: str) -> str:
    """Name of a folder; of a run's ``encoder`` folder that of the run."""
    path = Path(encoder)
    return path.parent.name if path.name == "encoder" and path.parent.name else path.name


def _compare(
    encoders: dict[str, str], names: Sequence[str], probe: "ProbeArguments", output: Path
) -> None:
    from hive_vision.reporting.probe_tables import probe_report, results_json
    from hive_vision.studies.probe import compare_encoders

    results = compare_encoders(encoders, names, probe)
    _write(output, results_json(results))
    show_report(probe_report(results), output)


def _layers(
    encoders: dict[str, str], names: Sequence[str], probe: "ProbeArguments", output: Path
) -> None:
    from hive_vision.reporting.figures import layer_figure, save_figure
    from hive_vision.reporting.probe_tables import how_found, layer_report
    from hive_vision.studies.probe import load_sets, probe_layers

    found = {data.name: probe_layers(encoders, data, probe) for data in load_sets(names, probe)}
    _write(output, {"layers": _each(found, lambda result: result.to_json())})
    accuracies = _each(found, lambda result: result.accuracy)
    figure = layer_figure(accuracies, how_found(_first(found), every_layer=True))
    save_figure(figure, output / "layers")
    show_report(layer_report(found), output)
    sys.stdout.write(f"figure: {output / 'layers.png'}\n")


def _interpolate(
    encoders: Sequence[str],
    names: Sequence[str],
    probe: "ProbeArguments",
    output: Path,
    given: str,
) -> None:
    from hive_vision.reporting.figures import interpolation_figure, save_figure
    from hive_vision.reporting.probe_tables import how_found, interpolation_report
    from hive_vision.studies.probe import probe_between

    bases = [encoder for encoder in encoders if encoder.startswith("base=")]
    trained = [encoder for encoder in encoders if encoder not in bases]
    if len(bases) != 1 or len(trained) != 1:
        raise ValueError("probe: --interpolate takes one ENCODER and base=FULL_MODEL")
    try:
        alphas = sorted({float(alpha) for alpha in given.split(",")})
    except ValueError as error:
        raise ValueError(f"alphas is {given!r}; give numbers from 0 to 1: {_ALPHAS}") from error
    base = bases[0].removeprefix("base=")
    found = probe_between(base, _encoder_folder(trained[0]), alphas, names, probe)
    content = _each(found, lambda result: result.to_json())
    _write(output, {"alphas": alphas, "interpolation": content})
    accuracies = _each(found, lambda result: result.accuracy)
    figure = interpolation_figure(alphas, accuracies, how_found(_first(found)))
    save_figure(figure, output / "interpolation")
    show_report(interpolation_report(alphas, found), output)
    sys.stdout.write(f"figure: {output / 'interpolation.png'}\n")


def _each(found: "Curves", value: Callable[["ProbeResult"], Any]) -> dict[str, dict[str, Any]]:
    """Take something of every result."""
    return {
        name: {line: [value(result) for result in results] for line, results in by.items()}
        for name, by in found.items()
    }


def _first(found: "Curves") -> "ProbeResult":
    return next(iter(next(iter(found.values())).values()))[0]


def _write(output: Path, content: dict[str, Any]) -> None:
    from hive_vision.folders import write_json

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", content)
