"""The result row of a run: accuracies by domain, sizes and speeds of what its stages left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
import domains
from cli.models import example_inputs
from cli.output import environment, note
from cli.settings import RunSettings
from domains import FinetuneSettings, Split, processes, timing


def result_row(
    settings: RunSettings,
    split: Split,
    out: Path,
    records: Mapping[str, dict[str, Any]],
    progress: bool,
) -> dict[str, Any]:
    """Evaluate and time the models of a run.

    Parameters
    ----------
    settings : RunSettings
    split : Split
    out : Path
        With the models ``dense``, ``pruned-only`` and ``pruned``.
    records : mapping of str to dict
        Of its stages.
    progress : bool
        Bars on standard error.

    Returns
    -------
    dict
        As `run --json` prints it. Several processes evaluate together, and time one by one.
    """
    names = {"dense": "dense", "pruned_only": "pruned-only", "pruned": "pruned"}
    seconds = {name: record["seconds"] for name, record in records.items()}
    start = time.perf_counter()
    models = {key: depgraph.load(out / name).eval() for key, name in names.items()}
    accuracy = {
        key: _accuracies(_evaluate(model, settings, split, progress), split.target)
        for key, model in models.items()
    }
    seconds["evaluate"] = time.perf_counter() - start
    timings = _timings({key: models[key] for key in ("dense", "pruned")}, settings, progress)
    row: dict[str, Any] = {
        "model": settings.model,
        "metric": settings.pruning["metric"],
        "ratio": settings.share.get("ratio"),
        "target": settings.share.get("target"),
        "target_domain": split.target,
        "schedule": settings.schedule.name,
        "recipe": settings.recipe,
        "algorithm": (settings.recovery or settings.dense or FinetuneSettings()).algorithm,
    }
    for key, measured in timings.items():
        row[key] = {
            **accuracy[key],
            "params": sum(p.numel() for p in models[key].parameters()),
            "macs": depgraph.count_macs(models[key], example_inputs(models[key])),
            "latency_ms": measured.latency_ms,
            "timing": asdict(measured),
        }
    row["pruned_only"] = accuracy["pruned_only"]
    row["speedup"] = timings["pruned"].speedup
    row["groups"] = records["pruned-only"]["groups"]
    row["history"] = {
        name: record["history"] for name, record in records.items() if "history" in record
    }
    row |= {"seconds": seconds, "seed": settings.seed, "settings": settings.plain()}
    return row | environment()


def _evaluate(
    model: nn.Module, settings: RunSettings, split: Split, progress: bool
) -> dict[str, float]:
    return domains.evaluate(
        model, split, device=settings.device, amp=settings.amp, progress=progress
    )


def _timings(
    models: dict[str, nn.Module], settings: RunSettings, progress: bool
) -> dict[str, timing.Timing]:
    if progress:
        note(f"timing for about {settings.timing.seconds:g} s ...")
    shape = tuple(example_inputs(models["dense"]).shape[1:])
    timings = {}
    for turn in range(processes.num_processes()):  # never two at once
        if turn == processes.rank():
            timings = timing.compare(models, shape, settings.timing)
        processes.wait()
    return timings


def _accuracies(accuracy: dict[str, float], target: str) -> dict[str, Any]:
    sources = [share for name, share in accuracy.items() if name != target]
    return {
        "accuracy": accuracy,
        "source_accuracy": sum(sources) / len(sources),
        "target_accuracy": accuracy[target],
    }
