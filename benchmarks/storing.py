"""How long saving and loading take: ``python -m benchmarks.storing``.

Beside what cannot be done without: writing and reading the same tensors by safetensors alone, and
the model's own constructor.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import timm
import torch
from safetensors.torch import load_file, save_file

import depgraph


def seconds(run: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@click.command()
@click.option("--model", "name", default="vit_base_patch16_224", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Taken in turn; medians are shown.")
def main(name: str, rounds: int) -> None:
    """Save and load a model of which half of every group is cut."""
    model: Any = timm.create_model(name).eval()
    example = torch.zeros(1, *model.pretrained_cfg["input_size"])
    graph = depgraph.trace(model, example)
    kept = {group.name: range(0, group.size, 2) for group in graph.prunable}
    small = graph.plan(kept).apply(model)
    tensors = {key: tensor.contiguous() for key, tensor in small.state_dict().items()}
    with tempfile.TemporaryDirectory() as top:
        file, folder = Path(top) / "alone.safetensors", Path(top) / "folder"
        steps: dict[str, Callable[[], Any]] = {
            "write tensors": lambda: save_file(tensors, file),
            "read tensors": lambda: load_file(file),
            "constructor": lambda: timm.create_model(name),
            "depgraph.save": lambda: depgraph.save(small, folder),
            "depgraph.load": lambda: depgraph.load(folder),
        }
        for run in steps.values():  # libraries are imported, files are in the cache
            run()
        times: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(rounds):
            for step, run in steps.items():
                times[step].append(seconds(run))
    found = {step: median(took) for step, took in times.items()}
    for step, took in found.items():
        click.echo(f"{1e3 * took:8.1f} ms  {step}")
    needed = found["write tensors"] + found["read tensors"] + found["constructor"]
    ours = found["depgraph.save"] + found["depgraph.load"]
    click.echo(f"{ours / needed:8.2f} x  save and load, of what cannot be done without")


if __name__ == "__main__":
    main()
