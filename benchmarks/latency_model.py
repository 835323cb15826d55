"""Predicted against measured latency, as shares of the dense model's, over random plans.

``python -m benchmarks.latency_model vit_base_patch16_224 --plans 30``. Each pruned model is timed
in turns with the dense one; what is compared is the ratio, which the load moves little.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from typing import Any

import click
import numpy as np
import timm
import torch
from torch import nn

import depgraph
from domains.measuring import timing
from pruners.calibration import measured_latency
from pruners.speed.context import random_sizes
from pruners.speed.latency import LatencyModel


def measure(
    model: nn.Module, latency: LatencyModel, plans: int, seconds: float, batch: int, device: str
) -> list[dict[str, float]]:
    """Shares predicted and measured of several random plans."""
    draw = random.Random(0)
    settings = timing.TimingSettings(batch, device, seconds=seconds, min_rounds=5, warmup_rounds=1)
    rows = []
    for _ in range(plans):
        rows.append(measure_one(model, latency, random_sizes(latency.graph, draw), settings))
        click.echo(" ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), err=True)
    return rows


def measure_one(
    model: nn.Module,
    latency: LatencyModel,
    sizes: Mapping[str, int],
    settings: timing.TimingSettings,
) -> dict[str, float]:
    """Shares predicted and measured of the plan that leaves these sizes."""
    plan = latency.graph.plan({name: range(n) for name, n in sizes.items()})
    models = {"dense": model, "pruned": plan.apply(model)}
    images = latency.graph.traced.example[0][0]
    shape = tuple(images.shape[1:])
    timed = timing.compare(models, shape, settings)["pruned"]
    predicted, measured = latency.share(sizes), 1 / timed.speedup
    return {
        "macs": plan.macs / latency.graph.macs,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
    }


def alignments(latency: LatencyModel) -> dict[str, dict[int, float]]:
    """How much longer ops take at sizes aligned to 1, 2, 4, ... by the widest group of a kind."""
    widest: dict[str, depgraph.Group] = {}
    for group in sorted(latency.graph.prunable, key=lambda group: group.size):
        widest[group.kind] = group
    return {kind: latency.multiples(group) for kind, group in widest.items()}


@click.command()
@click.argument("name", default="vit_base_patch16_224")
@click.option("--plans", default=30, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Of timing each plan.")
@click.option("--batch-size", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--latency-table", help="File of the table  [in the user's cache folder].")
def main(
    name: str, plans: int, seconds: float, batch_size: int, device: str, latency_table: str | None
) -> None:
    """Print one JSON object: the rows, and how far off they are."""
    model = timm.create_model(name).eval()
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    graph = depgraph.trace(model, torch.zeros(1, *size))
    start = time.perf_counter()
    latency = measured_latency(
        graph,
        model=model,
        device=device,
        batch_size=batch_size,
        file=latency_table,
        progress=True,
    )
    took = time.perf_counter() - start
    rows = measure(model, latency, plans, seconds, batch_size, device)
    errors = np.abs([row["error"] for row in rows])
    result: dict[str, Any] = {
        "model": name,
        "batch_size": batch_size,
        "device": latency.table.device.name,
        "calibration_seconds": took,
        "dense_ms_predicted": latency.dense_ms,
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "within_5_percent": float((errors <= 0.05).mean()),
        "slower_by_alignment": alignments(latency),
        "rows": rows,
    }
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
