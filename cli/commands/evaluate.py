"""``evaluate``: accuracy per domain of a model that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import depgraph
import domains
from cli.models import example_inputs, load_model
from cli.options import (
    compute_options,
    data_option,
    json_option,
    seed_option,
    split_option,
)
from cli.output import emit, percent, table


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@data_option
@click.option("--target", help="The unseen domain; sources are then judged on validation images.")
@split_option
@seed_option
@click.option("--batch-size", default=64, show_default=True)
@compute_options
@json_option
def evaluate(
    directory: Path,
    data: Path,
    target: str | None,
    split_by: str,
    seed: int,
    batch_size: int,
    device: str | None,
    amp: bool,
    as_json: bool,
) -> None:
    """Measure the accuracy of the model in DIR on every domain.

    With --target, each source domain is judged on the validation part of its split (the same as in
    training, by the same --seed and --split-by) and the target on all of its images; without it,
    every domain on all of its images.
    """
    model = load_model(str(directory))
    found = domains.load_domains(data)
    samples: Any = found
    if target is not None:
        samples = domains.leave_one_out(found, target, seed=seed, split_by=split_by)  # type: ignore[arg-type]
    accuracy = domains.evaluate(
        model, samples, batch_size=batch_size, device=device, amp=amp, progress=not as_json
    )
    result = {
        "model": str(directory),
        "target_domain": target,
        "accuracy": accuracy,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": depgraph.count_macs(model, example_inputs(model)),
        "seed": seed,
    }
    rows = [
        (name + (" (unseen)" if name == target else ""), percent(a)) for name, a in accuracy.items()
    ]
    emit(result, as_json, table(str(directory), ["domain", "accuracy"], rows))
