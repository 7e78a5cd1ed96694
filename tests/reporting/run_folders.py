"""Folders as the commands leave them, with small made-up content."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from hive_vision.evaluation.probe import ProbeResult
from hive_vision.reporting.probe_tables import results_json
from hive_vision.reporting.vlm_tables import vlm_json
from tests.reporting.test_vlm_tables import runs

FINGERPRINT = "0123456789abcdef" * 4
SETTINGS = {"probe": "linear", "protocol": "fast", "layer": 2, "depth": 2, "pooling": "mean"}
STAGES = ("stage1", "stage2")
ENVIRONMENT = {
    "versions": {"hive-vision": "0.1.0", "torch": "2.15.0"},
    "python": "3.11.7",
    "platform": "Linux",
    "device": "NVIDIA X",
    "threads": 8,
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def stage_result(name: str, loss: float = 1.25, **other: Any) -> dict[str, Any]:
    proof = {
        "projectors": {"moved": 4, "unchanged": 0},
        "vision_model": {"moved": 0, "unchanged": 195},
    }
    return {
        "name": name,
        "steps": 20,
        "seconds_per_step": 0.5,
        "trained_parameters": 1234,
        "held_out_loss": loss,
        "held_out_loss_shuffled_images": loss + 0.5,
        "update_proof": proof,
    } | other


def log_lines(stage: str, steps: int, start: float = 3.0) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "step": step, "loss": start / step**0.5}
        for step in range(10, steps + 1, 10)
    ]


def pretrain_run(
    folder: Path, method: str = "hive", finished: bool = True, loss: float = 1.25, **recipe: Any
) -> Path:
    """A run; one that is not finished is in its second stage."""
    stages = {
        s: {"rules": {"projectors": 0.002}, "max_steps": 20, "batch_size": 64} for s in STAGES
    }
    content = {
        "output": str(folder),
        "seed": 0,
        "precision": "auto",
        "method": method,
        "model": {"vision": "some/vit", "language": "some/llm"},
        "data": {"train": "photos", "num_workers": 0},
        **stages,
    } | recipe
    _run(folder, content, finished, {"held_out_loss": loss})
    if finished:
        results = {
            "method": method,
            "seed": content["seed"],
            "captions": 8000,
            "held_out_captions": 512,
            "bad_samples": 3,
            "trained_parameters": 0 if method == "base" else 1234,
            "stages": [] if method == "base" else [stage_result(s, loss) for s in STAGES],
            "held_out_loss": loss,
            "peak_memory_bytes": 3 * 2**29,
            "encoder": str(folder / "encoder"),
        }
        if method != "base":
            results["held_out_loss_shuffled_images"] = loss + 0.5
        write(folder / "results.json", results)
    if method == "base":
        for stage in STAGES:
            (folder / stage / "result.json").unlink()
        (folder / "metrics.jsonl").unlink()
    data = {"fingerprint": FINGERPRINT, "captions": 8000, "excluded": 0}
    where = "encoder" if finished else "stage1/model"
    write(folder / where / "manifest.json", {"kind": "x", "data": data, "stage": "stage1"})
    return folder


def record_gradients(folder: Path, norms: list[float | None], *steps: int) -> Path:
    """Add to a run's log what ``gradients_every`` writes in its second stage."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            line = {"stage": "stage2", "step": step, "encoder_gradients": norms}
            file.write(json.dumps(line) + "\n")
    return folder


def finetune_run(folder: Path, finished: bool = True) -> Path:
    stages = {s: {"rules": {"projectors": 0.002}, "max_steps": 20, "batch_size": 8} for s in STAGES}
    model = {"vision": "runs/hive/encoder", "language": "some/llm", "chat_template": "llava"}
    data = {"stage1": {"train": "captions.json"}, "stage2": {"train": [{"path": "chat.json"}]}}
    _run(
        folder, {"output": str(folder), "seed": 1, "model": model, "data": data, **stages}, finished
    )
    if finished:
        results = {
            "vision": model["vision"],
            "language": model["language"],
            "seed": 1,
            "conversations": {"stage1": 40, "stage2": 60},
            "bad_samples": {"stage1": 1, "stage2": 1},
            "stages": [stage_result(s) for s in STAGES],
            "model": str(folder / "model"),
            "peak_memory_bytes": 2**30,
        }
        write(folder / "results.json", results)
        for stage, count in results["conversations"].items():
            facts = {"fingerprint": f"{stage}-print-and-more", "conversations": count}
            content = {"kind": "model", "data": facts, "stage": stage}
            write(folder / stage / "model" / "manifest.json", content)
    return folder


def _run(folder: Path, recipe: dict[str, Any], finished: bool, losses: Any = None) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write(folder / "environment.json", ENVIRONMENT)
    lines = log_lines("stage1", 20) + log_lines("stage2", 20 if finished else 10)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + ("" if finished else '{"stage": "sta'))
    loss = (losses or {}).get("held_out_loss", 1.25)
    for stage in STAGES if finished else STAGES[:1]:
        write(folder / stage / "result.json", stage_result(stage, loss))


def probe_result(share: float, seeds: int = 2, data: str = "texture") -> ProbeResult:
    random = np.random.default_rng(round(1000 * share))
    correct = random.random((seeds, 400)) < share
    chosen = tuple({"held_out_accuracy": share} for _ in range(seeds))
    return ProbeResult("x", data, correct, tuple(range(seeds)), SETTINGS, chosen)


def probes(seeds: int = 2, **shares: float) -> dict[str, Any]:
    """Results of encoders on two sets: on texture they have these shares, on digit all 0.2."""
    return results_json(
        {
            name: {
                "texture": probe_result(share, seeds),
                "digit": probe_result(0.2, seeds, "digit"),
            }
            for name, share in shares.items()
        }
    )


def png(width: int = 60, height: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 120, 90)).save(file, format="PNG")
    return file.getvalue()


def maps_folder(folder: Path) -> Path:
    content = {
        "kind": "maps",
        "models": {"sa": {}, "hive": {}},
        "figures": [{"file": "gradients-0.png", "title": "Gradients", "note": "Bright is large."}],
        "tables": [
            {
                "title": "Gradient flow",
                "headings": ["layer", "sa", "hive"],
                "rows": [[{"text": "1"}, {"text": "0.1"}, {"text": "0.4", "bold": True}]],
                "note": "Shares of the whole.",
            }
        ],
        "sentences": ["In hive, early layers get more gradient than in sa."],
    }
    write(folder / "results.json", content)
    (folder / "gradients-0.png").write_bytes(png())
    return folder


def demo_folder(folder: Path, with_maps: bool = False) -> Path:
    shares = {"base": 0.5, "sa": 0.51, "hive": 0.9}
    methods = []
    for method in shares:
        run = pretrain_run(folder / method, method, miniature={"folder": "runs/miniature"})
        methods.append(json.loads((run / "results.json").read_text()))
    write(folder / "results.json", {"methods": methods, "probe": probes(**shares)})
    if with_maps:
        maps_folder(folder / "maps")
    return folder


def study_folder(folder: Path, finished: bool = True) -> Path:
    shares = {"base": 0.5, "hive": 0.9}
    for method in shares:
        for seed in (10, 9):
            run = folder / "runs" / f"{method}-{seed}"
            pretrain_run(run, method, seed=seed, loss=1 + seed / 100)
    if finished:
        layers = {
            name: [probe_result(share - 0.1).to_json(), probe_result(share).to_json()]
            for name, share in shares.items()
        }
        search = {"hive": {"chosen": "slow", "held_out_accuracy": {"fast": 0.6, "slow": 0.7}}}
        content = {
            **probes(**shares),
            "layers": {"texture": layers},
            "search": search,
            "settings": {"seeds": [9, 10]},
        }
        write(folder / "results.json", content)
    return folder


def evaluate_folder(folder: Path, **shares: tuple[float, ...]) -> Path:
    write(folder / "results.json", vlm_json({name: runs(*own) for name, own in shares.items()}))
    return folder
