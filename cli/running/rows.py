"""The result row of a run: accuracies by domain, sizes and speeds of what its stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import depgraph
from cli.output import environment
from cli.running.models import example_inputs
from cli.running.settings import RunSettings
from depgraph.storing.reading import read_text
from domains import FinetuneSettings
from domains.measuring import timing
from domains.running import processes


def result_row(
    settings: RunSettings,
    target: str,
    models: Mapping[str, nn.Module],
    accuracy: Mapping[str, dict[str, float]],
    records: Mapping[str, dict[str, Any]],
    images: int,
) -> dict[str, Any]:
    """Count and time the models of a run, and put all that is known of it together.

    Parameters
    ----------
    settings : RunSettings
    target : str
        The domain left out of training.
    models, accuracy : mapping
        By ``"dense"``, ``"pruned_only"`` and ``"pruned"``; accuracies by domain.
    records : mapping of str to dict
        Of its stages.
    images : int
        That an epoch draws.

    Returns
    -------
    dict
        As `run --json` prints it, but for the seconds that it took.
    """
    timings = _timings({key: models[key] for key in ("dense", "pruned")}, settings)
    row: dict[str, Any] = {
        "model": settings.model,
        "metric": settings.control or settings.pruning["metric"],
        "across_domains": settings.across_domains,
        "ratio": settings.share.get("ratio"),
        "target": settings.share.get("target"),
        "target_domain": target,
        "schedule": settings.schedule.name,
        "recipe": settings.recipe,
        "algorithm": (settings.recovery or settings.dense or FinetuneSettings()).algorithm,
    }
    for key, measured in timings.items():
        row[key] = {
            **_accuracies(accuracy[key], target),
            "params": sum(p.numel() for p in models[key].parameters()),
            "macs": depgraph.count_macs(models[key], example_inputs(models[key])),
            "latency_ms": measured.latency_ms,
            "timing": asdict(measured),
        }
    cut = records["pruned-only"]
    if "predicted_latency_kept" in cut:
        row["predicted_latency_kept"] = cut["predicted_latency_kept"]
    row["pruned_only"] = _accuracies(accuracy["pruned_only"], target)
    row["speedup"] = timings["pruned"].speedup
    row["speedup_interval"] = list(timings["pruned"].speedup_interval)
    row |= {key: cut[key] for key in ("groups", "scores")}
    row["training"] = {
        "dense": _training(settings.dense, records["dense"], images),
        "pruned": _training(settings.recovery, records["pruned"], images),
    }
    row["history"] = {
        name: record["history"] for name, record in records.items() if "history" in record
    }
    row |= {"seed": settings.seed, "settings": settings.plain()}
    return row | environment()


def finished_row(path: Path) -> dict[str, Any] | None:
    """The result that a run wrote; None where there is none, or none that can be read."""
    try:
        row = json.loads(read_text(path.parent, path.name))
    except (ValueError, RecursionError):  # DepgraphError among them
        return None
    parts = ("settings", "dense", "pruned", "pruned_only")
    whole = isinstance(row, dict) and all(isinstance(row.get(part), dict) for part in parts)
    return row if whole else None


def _training(
    recipe: FinetuneSettings | None, record: Mapping[str, Any], images: int
) -> dict[str, Any]:
    """What the fine-tuning of a stage took, validation included, and which epoch was kept."""
    history = record["history"]
    steps = 0 if recipe is None else len(history) * -(-images // recipe.batch_size)
    seconds = sum(epoch["seconds"] for epoch in history)
    speed = {"steps_per_second": steps / seconds} if steps else {}
    came_to = (
        {"best_epoch": record.get("best_epoch"), "start": record.get("start")} if history else {}
    )
    return {"epochs": len(history), "steps": steps, "seconds": seconds, **speed, **came_to}


def _timings(models: dict[str, nn.Module], settings: RunSettings) -> dict[str, timing.Timing]:
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
