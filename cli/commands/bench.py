"""``bench``: a pruned model timed beside a dense one, in turns, in one run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import timm
from torch import nn

import depgraph
from cli.options.params import present_threads
from cli.options.shared import (
    batch_size_option,
    device_option,
    json_option,
    seconds_option,
    seed_option,
)
from cli.output import emit, environment, table
from cli.running.models import example_inputs, load_model
from cli.running.saved import dense_of, load_saved, read_record, saved_in
from cli.showing.speed import PAIRED, speed_says
from depgraph import DepgraphError
from domains.measuring import timing
from domains.measuring.training_timing import TrainingTiming, compare_training


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dense", type=click.Path(path_type=Path), help="Saved dense model to compare with.")
@device_option("cpu")
@batch_size_option(1)
@click.option(
    "--threads", type=click.IntRange(1), callback=present_threads, help="CPU threads  [as torch]."
)
@seconds_option(10.0, "--seconds")
@click.option("--amp", type=click.Choice(["fp16", "bf16"]), help="Autocast to this precision.")
@click.option("--channels-last", is_flag=True)
@click.option("--compile", "compiled", is_flag=True, help="Time torch.compile of both.")
@click.option("--training", is_flag=True, help="Time training steps, not forward passes.")
@click.option("--checkpointing", is_flag=True, help="With --training: recompute activations.")
@seed_option
@json_option
def bench(
    directory: Path,
    dense: Path | None,
    device: str,
    batch_size: int,
    threads: int | None,
    seconds: float,
    amp: str | None,
    channels_last: bool,
    compiled: bool,
    training: bool,
    checkpointing: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Time the model in DIR beside its dense original.

    The original is --dense, or DIR/../dense where a run left one, or else the model that `prune`
    was called with, with random weights, which are as fast as any.
    """
    if checkpointing and not training:
        raise click.UsageError("--checkpointing goes with --training")
    if channels_last and training:
        raise click.UsageError("--channels-last does not go with --training")
    pruned = load_saved(directory)
    example = example_inputs(pruned)
    original, origin = _dense(directory, dense, pruned)
    settings = timing.TimingSettings(
        batch_size=batch_size,
        device=device,
        threads=threads,
        seconds=seconds,
        amp=amp,
        channels_last=channels_last,
        compile=compiled,
        seed=seed,
    )
    models = {"dense": original, "pruned": pruned}
    if training:
        _training(models, tuple(example.shape[1:]), settings, checkpointing, origin, as_json)
        return
    timings = timing.compare(models, tuple(example.shape[1:]), settings)
    result: dict[str, Any] = {
        name: {
            **asdict(timings[name]),
            "params": sum(p.numel() for p in model.parameters()),
            "macs": depgraph.count_macs(model, example),
        }
        for name, model in models.items()
    }
    result |= _said(timings["pruned"], origin)
    rows = [
        (
            name,
            f"{result[name]['params']:,}",
            f"{result[name]['macs']:,}",
            f"{t.latency_ms:.2f}",
            f"{t.latency_iqr_ms:.2f}",
            f"{t.throughput:.1f}",
            f"{t.peak_memory_bytes / 2**20:.0f}",
            "" if name == "dense" else speed_says(t.speedup, t.speedup_interval),
        )
        for name, t in timings.items()
    ]
    columns = ["", "parameters", "MACs", "latency ms", "IQR ms", "images/s", "peak MiB", "speed"]
    title = f"batch {batch_size}, {timings['dense'].device_name}; dense from {origin}"
    title += f"\n{PAIRED.format(rounds=timings['dense'].rounds)}"
    title += " IQR: interquartile range of each by itself."
    emit(result, as_json, table(title, columns, rows))


def _training(
    models: dict[str, nn.Module],
    shape: tuple[int, ...],
    settings: timing.TimingSettings,
    checkpointing: bool,
    origin: str,
    as_json: bool,
) -> None:
    """Time training steps of both, and print what came of it."""
    timings = compare_training(models, shape, settings, checkpointing=checkpointing)
    result = {name: asdict(measured) for name, measured in timings.items()}
    rows = [
        (
            name,
            f"{t.step_ms:.1f}",
            f"{t.steps_per_second:.2f}",
            f"{t.peak_memory_bytes / 2**20:.0f}",
            "" if name == "dense" else speed_says(t.speedup, t.speedup_interval),
        )
        for name, t in timings.items()
    ]
    columns = ["", "step ms", "steps/s", "peak MiB", "speed"]
    title = f"training at batch {settings.batch_size}, {timings['dense'].dtype}; from {origin}"
    title += f"\n{PAIRED.format(rounds=timings['dense'].rounds)}"
    emit({**result, **_said(timings["pruned"], origin)}, as_json, table(title, columns, rows))


def _said(pruned: timing.Timing | TrainingTiming, origin: str) -> dict[str, Any]:
    return {
        "speedup": pruned.speedup,
        "speedup_interval": pruned.speedup_interval,
        "dense_from": origin,
        **environment(),
    }


def _dense(directory: Path, dense: Path | None, pruned: nn.Module) -> tuple[nn.Module, str]:
    """The dense model, and where it is from."""
    dense = dense or dense_of(directory)
    if dense is not None:
        return load_saved(dense), str(dense)
    name, arguments = _record(directory, pruned)
    plans = depgraph.plans_of(pruned)
    if not plans or not name:
        raise DepgraphError(f"'{directory}' does not say its dense original; give it with --dense")
    saved = Path(name).is_dir()
    model = load_model(name, pretrained=False, **({} if saved else arguments))
    found = {g.name: g.size for g in depgraph.trace(model, example_inputs(model)).prunable}
    if found != plans[0].sizes:
        raise DepgraphError(
            f"'{directory}' was not pruned from '{name}' as it is; give the dense model with "
            "--dense"
        )
    return model, name if saved else f"{name}, random weights"


def _record(directory: Path, pruned: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the dense model: as `prune` was called, else as the model says."""
    record = (saved_in(directory) or directory) / "prune.json"
    if record.exists():
        known = read_record(record)
        if not isinstance(known.get("arguments"), dict):
            raise DepgraphError(f"'{record}' does not say the dense model; give it with --dense")
        return known.get("model") or "", known["arguments"]
    name = (getattr(pruned, "pretrained_cfg", None) or {}).get("architecture") or ""
    arguments = {
        "img_size": example_inputs(pruned).shape[-1],
        "num_classes": getattr(pruned, "num_classes", None),
    }
    return (name if timm.is_model(name) else ""), arguments
