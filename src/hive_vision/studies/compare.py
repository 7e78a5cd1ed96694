"""Methods against each other, end to end: pre-train each with several seeds, probe, compare.

What is done is kept: the same command goes on where it stopped.
"""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hive_vision.data.classification import ClassificationSet
from hive_vision.data.parallel import processors
from hive_vision.evaluation.arguments import WHOLE_MODEL, ProbeArguments
from hive_vision.evaluation.features import FrozenEncoder
from hive_vision.evaluation.probe import ProbeResult, probe_encoder
from hive_vision.folders import read_json, write_json
from hive_vision.reporting.probe_tables import results_json
from hive_vision.studies.plan import make_plan
from hive_vision.studies.probe import check_layers, load_sets, probe_layers
from hive_vision.training.arguments import Method, PretrainArguments
from hive_vision.training.miniature import ensure_miniature
from hive_vision.training.pretrain import pretrain
from hive_vision.training.recipes import load_recipe
from hive_vision.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

EQUAL_FLOPS = "_equal_flops"


@dataclass(frozen=True)
class SearchArguments:
    """The same candidates for every method, judged on images that no result is measured on.

    Args:
        seed: Of the candidates' runs; none of the seeds that are compared.
        candidates: For each candidate's name the recipe overrides that it stands for.
    """

    candidates: dict[str, list[str]]
    seed: int = 100


@dataclass(frozen=True)
class CompareArguments:
    """A comparison of methods.

    Args:
        recipe: Recipe of every run.
        output: Folder for the runs and results.
        data: Classification sets, as hive-vision probe takes them.
        overrides: Recipe overrides for every run.
        methods: Which methods.
        seeds: Runs of each method; base has nothing to train, its heads have the seeds.
        equal_flops: Methods that are also run with as many operations as hive has in each stage.
        layer_data: Those of the sets on which every encoder layer is probed too.
        search: What is chosen for each method before.
        probe: How encoders are probed; its seeds are those of the runs.
        jobs: Runs at once; they share the processors.
    """

    recipe: str
    output: str
    data: list[str]
    overrides: list[str] = field(default_factory=list)
    methods: list[Method] = field(default_factory=lambda: ["base", "sa", "cascaded", "hive"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    equal_flops: list[Method] = field(default_factory=list)
    layer_data: list[str] = field(default_factory=list)
    search: SearchArguments | None = None
    probe: ProbeArguments = field(default_factory=ProbeArguments)
    jobs: int = 1


@dataclass(frozen=True)
class _Run:
    """One pre-training run: what distinguishes it, and where it goes."""

    label: str
    method: Method
    seed: int
    folder: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        results: Method -> set -> result, a row of each run.
        layers: Set -> method -> result of each encoder layer, a row of each run.
        search: What was tried for each method before, and chosen.
    """

    results: dict[str, dict[str, ProbeResult]]
    layers: dict[str, dict[str, list[ProbeResult]]]
    search: dict[str, dict[str, Any]]


def compare_methods(arguments: CompareArguments) -> Comparison:
    """Run a comparison, or what is missing of it; ``output/results.json`` has all of it.

    Raises:
        ValueError: If recipe, sets and methods do not fit, or the folder holds runs of others.
    """
    output = Path(arguments.output)
    _check(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.miniature is not None:
        ensure_miniature(recipe.miniature)
    sets = load_sets(arguments.data, arguments.probe)
    search = _search(arguments, sets, output / "search")
    chosen = {method: found["chosen"] for method, found in search.items()}
    runs = _runs(arguments, chosen, output / "runs")
    _work_through(arguments, runs, arguments.layer_data)
    by_label: dict[str, list[_Run]] = {run.label: [] for run in runs}
    for run in runs:
        by_label[run.label].append(run)

    def probed(data: ClassificationSet, own: list[_Run], every_layer: bool) -> list[ProbeResult]:
        found = [_probe(arguments, run, data, every_layer) for run in own]
        return [_joined(own, parts) for parts in zip(*found, strict=True)]

    results = {
        label: {data.name: probed(data, own, every_layer=False)[0] for data in sets}
        for label, own in by_label.items()
    }
    layers = {
        data.name: {label: probed(data, own, every_layer=True) for label, own in by_label.items()}
        for name, data in zip(arguments.data, sets, strict=True)
        if name in arguments.layer_data
    }
    content = {
        **results_json(results),
        "layers": {
            name: {label: [result.to_json() for result in of] for label, of in by.items()}
            for name, by in layers.items()
        },
        "search": search,
        "settings": asdict(arguments),
    }
    write_json(output / "results.json", content)
    return Comparison(results, layers, search)


def _check(arguments: CompareArguments) -> None:
    """Refuse a study that could only fail later.

    Raises:
        ValueError: Says what does not fit.
    """
    if not (arguments.data and arguments.methods and arguments.seeds):
        raise ValueError("a study needs data, methods and seeds; one of the lists is empty")
    for method in arguments.equal_flops:
        if method in ("base", "hive") or not {method, "hive"} <= set(arguments.methods):
            raise ValueError(
                f"equal_flops has {method!r}; it takes sa and cascaded, where methods has them and "
                "hive"
            )
    if arguments.probe.probe in WHOLE_MODEL:
        raise ValueError(
            f"probe.probe is {arguments.probe.probe}, which judges a whole CLIP or SigLIP; use "
            "linear, attentive or knn"
        )
    for name in arguments.layer_data:
        if name not in arguments.data:
            raise ValueError(f"layer_data has {name!r}, which is not in data: add it there too")
    if arguments.layer_data:
        check_layers(arguments.probe)
    if arguments.search is not None:
        if arguments.probe.probe == "knn" or arguments.probe.protocol == "paper":
            raise ValueError(
                "a search needs a probe that holds training images out, to judge by them: "
                f"protocol=fast with linear or attentive; got probe.probe={arguments.probe.probe} "
                f"and probe.protocol={arguments.probe.protocol}"
            )
        if arguments.search.seed in arguments.seeds:
            raise ValueError(
                f"search.seed is {arguments.search.seed}, one of the seeds; give another"
            )
        for overrides in arguments.search.candidates.values():
            load_recipe(arguments.recipe, (*arguments.overrides, *overrides))


def _search(
    arguments: CompareArguments, sets: Sequence[ClassificationSet], output: Path
) -> dict[str, dict[str, Any]]:
    """Choose a candidate for each method by accuracy on held-out training images."""
    if arguments.search is None:
        return {}
    search = arguments.search
    methods = [method for method in arguments.methods if method != "base"]
    runs = [
        _Run(
            candidate,
            method,
            search.seed,
            output / f"{method}-{candidate}",
            (*arguments.overrides, *search.candidates[candidate]),
        )
        for candidate in search.candidates
        for method in methods
    ]
    _work_through(arguments, runs)
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        scores = {
            run.label: float(np.mean([_held_out(arguments, run, data) for data in sets]))
            for run in runs
            if run.method == method
        }
        best = max(scores, key=lambda candidate: scores[candidate])
        logger.info("%s: best candidate %s of %s", method, best, scores)
        found[method] = {"chosen": best, "held_out_accuracy": scores}
    return found


def _held_out(arguments: CompareArguments, run: _Run, data: ClassificationSet) -> float:
    """Accuracy on the part of the training images that the head's numbers were chosen on."""
    (result,) = _probe(arguments, run, data)
    return float(np.mean([chosen["held_out_accuracy"] for chosen in result.chosen]))


def _runs(arguments: CompareArguments, chosen: dict[str, str], output: Path) -> list[_Run]:
    """All runs that are compared, seed by seed, so that an early stop leaves whole seeds."""
    common = tuple(arguments.overrides)
    candidates = arguments.search.candidates if arguments.search else {}
    overrides = {
        method: common + tuple(candidates.get(chosen.get(method, ""), ()))
        for method in arguments.methods
    }
    variants: list[tuple[str, Method, tuple[str, ...]]] = [
        (method, method, overrides[method]) for method in arguments.methods
    ]
    variants += [
        (method + EQUAL_FLOPS, method, _with_flops_of_hive(arguments.recipe, method, overrides))
        for method in arguments.equal_flops
    ]
    return [
        _Run(label, method, seed, output / f"{label}-{seed}", settings)
        for seed in arguments.seeds
        for label, method, settings in variants
    ]


def _with_flops_of_hive(
    recipe: str, method: Method, overrides: dict[Method, tuple[str, ...]]
) -> tuple[str, ...]:
    """Give a method in each stage as many steps as hive's operations pay for."""
    plans = {
        name: make_plan(load_recipe(recipe, (*overrides[name], f"method={name}")))["stages"]
        for name in ("hive", method)
    }
    cost = {stage["name"]: stage["flops_per_caption"] for stage in plans[method]}
    steps = tuple(
        f"{stage['name']}.max_steps="
        f"{round(stage['flops'] / stage['batch_size'] / cost[stage['name']])}"
        for stage in plans["hive"]
    )
    return (*overrides[method], *steps)


def _work_through(
    arguments: CompareArguments, runs: Sequence[_Run], layer_data: Sequence[str] = ()
) -> None:
    """Pre-train what is missing, and probe it where it was trained.

    Raises:
        ValueError: If a folder holds a run of another recipe; before anything runs.
    """
    for run in runs:
        RunFolder(_recipe(arguments.recipe, run)).check()
    work = partial(_work, arguments, layer_data)
    if arguments.jobs == 1:
        for run in runs:
            work(run)
        return
    threads = max(1, processors() // arguments.jobs)
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, torch.set_num_threads, (threads,)) as pool:
        for run in pool.map(work, runs):
            logger.info("%s is finished", run.folder)


def _work(arguments: CompareArguments, layer_data: Sequence[str], run: _Run) -> _Run:
    logger.info("%s, method %s, seed %d", run.label, run.method, run.seed)
    pretrain(_recipe(arguments.recipe, run))
    if run.method == "base":  # the same encoder for every seed: its features are computed once
        return run
    for name, data in zip(arguments.data, load_sets(arguments.data, arguments.probe), strict=True):
        _probe(arguments, run, data)
        if name in layer_data:
            _probe(arguments, run, data, every_layer=True)
    return run


def _recipe(recipe: str, run: _Run) -> PretrainArguments:
    own = (f"method={run.method}", f"seed={run.seed}", f"output={run.folder}")
    return load_recipe(recipe, (*run.overrides, *own))


def _probe(
    arguments: CompareArguments, run: _Run, data: ClassificationSet, every_layer: bool = False
) -> list[ProbeResult]:
    """Probe a run's encoder, or each of its layers, with heads of its seed; kept beside it."""
    settings = replace(arguments.probe, seeds=(run.seed,))
    request = {"probe": asdict(settings), "data": data.train.fingerprint + data.test.fingerprint}
    request = json.loads(json.dumps(request))  # as it is read back: no tuples
    path = run.folder / f"{'layers' if every_layer else 'probe'}-{data.name}.json"
    kept = read_json(path)
    if kept is not None and kept["request"] == request:
        return [ProbeResult.from_json(result) for result in kept["results"]]
    folder = run.folder / "encoder"
    if every_layer:
        results = probe_layers({run.label: str(folder)}, data, settings)[run.label]
    else:
        encoder = FrozenEncoder.load(folder, precision=settings.precision)
        results = [probe_encoder(encoder, data, settings)]
    write_json(path, {"request": request, "results": [result.to_json() for result in results]})
    return results


def _joined(runs: Sequence[_Run], parts: Sequence[ProbeResult]) -> ProbeResult:
    """Make one result of a method's runs, a row for each."""
    return replace(
        parts[0],
        encoder=runs[0].label,
        correct=np.concatenate([part.correct for part in parts]),
        seeds=tuple(run.seed for run in runs),
        chosen=tuple(chosen for part in parts for chosen in part.chosen),
    )
