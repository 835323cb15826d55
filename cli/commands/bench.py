"""``bench``: a pruned model timed beside a dense one, in turns, in one run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import timm
from torch import nn

import depgraph
from cli.models import dense_of, example_inputs, load_model
from cli.options import json_option, seed_option
from cli.output import emit, environment, table
from depgraph import DepgraphError
from domains import timing


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dense", type=click.Path(path_type=Path), help="Saved dense model to compare with.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--batch-size", default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--seconds", default=10.0, show_default=True, help="Time to measure for.")
@click.option("--amp", type=click.Choice(["fp16", "bf16"]), help="Autocast to this precision.")
@click.option("--channels-last", is_flag=True)
@click.option("--compile", "compiled", is_flag=True, help="Time torch.compile of both.")
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
    seed: int,
    as_json: bool,
) -> None:
    """Time the model in DIR beside its dense original.

    The original is --dense, or DIR/../dense where a run left one, or else the timm model of the
    name in DIR/config.json with random weights, which are as fast as any.
    """
    pruned = load_model(str(directory))
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
    timings = timing.compare(models, tuple(example.shape[1:]), settings)
    result: dict[str, Any] = {
        name: {
            **asdict(timings[name]),
            "params": sum(p.numel() for p in model.parameters()),
            "macs": depgraph.count_macs(model, example),
        }
        for name, model in models.items()
    }
    result |= {"speedup": timings["pruned"].speedup, "dense_from": origin, **environment()}
    rows = [
        (
            name,
            f"{result[name]['params']:,}",
            f"{result[name]['macs']:,}",
            f"{t.latency_ms:.2f} ± {t.latency_iqr_ms / 2:.2f}",
            f"{t.throughput:.1f}",
            f"{t.peak_memory_bytes / 2**20:.0f}",
            f"{t.speedup:.2f}x",
        )
        for name, t in timings.items()
    ]
    columns = ["", "parameters", "MACs", "latency ms", "images/s", "peak MiB", "speed-up"]
    title = f"batch {batch_size}, {timings['dense'].device_name}; dense from {origin}"
    emit(result, as_json, table(title, columns, rows))


def _dense(directory: Path, dense: Path | None, pruned: nn.Module) -> tuple[nn.Module, str]:
    dense = dense or dense_of(directory)
    if dense is not None:
        return load_model(str(dense)), str(dense)
    plans = depgraph.plans_of(pruned)
    name = (getattr(pruned, "pretrained_cfg", None) or {}).get("architecture")
    if not plans or not name or not timm.is_model(name):
        raise DepgraphError(f"'{directory}' does not say its dense original; give it with --dense")
    size = example_inputs(pruned).shape[-1]
    model = load_model(
        name, pretrained=False, img_size=size, num_classes=getattr(pruned, "num_classes", None)
    )
    expected = plans[0].sizes
    found = {g.name: g.size for g in depgraph.trace(model, example_inputs(model)).prunable}
    if found != expected:
        raise DepgraphError(
            f"'{directory}' was not pruned from timm's '{name}' as it is; give the dense model "
            "with --dense"
        )
    return model, f"timm {name}, random weights"
