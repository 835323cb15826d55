"""``evaluate``: accuracy per domain of a saved model, and of its dense original if it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import nn

import depgraph
import domains
from cli.options.precision import half
from cli.options.shared import (
    batch_size_option,
    compute_options,
    data_option,
    json_option,
    seconds_option,
    seed_option,
    split_option,
)
from cli.output import emit, percent, table
from cli.running.models import check_classes, example_inputs
from cli.running.saved import dense_of, load_saved, read_record, saved_in
from cli.verbosity import progress
from domains.measuring import timing


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@data_option
@click.option("--target", help="The unseen domain; sources are then judged on validation images.")
@click.option("--dense", type=click.Path(path_type=Path), help="Dense model to judge beside it.")
@split_option
@seed_option
@batch_size_option(64)
@seconds_option(3.0)
@compute_options
@json_option
def evaluate(
    directory: Path,
    data: Path,
    target: str | None,
    dense: Path | None,
    split_by: str,
    seed: int,
    batch_size: int,
    bench_seconds: float,
    device: str,
    amp: bool,
    as_json: bool,
) -> None:
    """Measure the accuracy of the model in DIR on every domain.

    With --target, each source domain is judged on the validation part of its split (the same as in
    training, by the same --seed and --split-by) and the target on all of its images; without it,
    every domain on all of its images. The dense model is --dense, or the one that a run left beside
    DIR.
    """
    dense = dense or dense_of(directory)
    models = {"dense": None if dense is None else load_saved(dense)}
    models["pruned"] = load_saved(directory)
    present = {name: model for name, model in models.items() if model is not None}
    found = domains.load_domains(data, progress=progress(as_json))
    for model in present.values():
        check_classes(model, len(found.classes), data)
    samples: Any = found
    if target is not None:
        samples = domains.leave_one_out(found, target, seed=seed, split_by=split_by)  # type: ignore[arg-type]
    settings = timing.TimingSettings(device=device, amp=half(amp, device), seconds=bench_seconds)
    shape = tuple(example_inputs(present["pruned"]).shape[1:])
    times = timing.compare(present, shape, settings)
    result: dict[str, Any] = {"model": str(directory), **_origin(directory)}
    result |= {"target_domain": target, "dense": None, "seed": seed}
    for name, model in present.items():
        accuracy = domains.evaluate(
            model,
            samples,
            batch_size=batch_size,
            device=device,
            amp=amp,
            progress=progress(as_json),
        )
        result[name] = _measured(model, accuracy, times[name].latency_ms)
    result["accuracy"] = result["pruned"]["accuracy"]
    both = "dense" in present
    result["speedup"] = times["pruned"].speedup if both else None
    result["speedup_interval"] = list(times["pruned"].speedup_interval) if both else None
    rows = [
        (
            domain + (" (unseen)" if domain == target else ""),
            *(percent(result[name]["accuracy"][domain]) for name in present),
        )
        for domain in result["accuracy"]
    ]
    columns = ["domain", *(name if len(present) > 1 else "accuracy" for name in present)]
    emit(result, as_json, table(str(directory), columns, rows))


def _measured(model: nn.Module, accuracy: dict[str, float], latency_ms: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": depgraph.count_macs(model, example_inputs(model)),
        "latency_ms": latency_ms,
    }


def _origin(directory: Path) -> dict[str, Any]:
    """Metric and ratio, from the record that `prune` or `run` left; None where there is none."""
    place = saved_in(directory) or directory
    for record in (place / "prune.json", place.parent / "result.json"):
        if record.exists():
            known = read_record(record)
            return {"metric": known.get("metric"), "ratio": known.get("ratio")}
    return {"metric": None, "ratio": None}
