"""Pruned models beside dense ones and beside models of the same MACs that were built that size.

``python -m benchmarks.from_scratch vit_base_patch16_224 --ratio 0.5 --batch-size 1``. All are timed
in turns in one process. The model from scratch has as many blocks, heads of the same width as the
dense one, and the width and the ratio of the MLP that come nearest to the pruned model's MACs.
"""

from __future__ import annotations

import json
from typing import Any

import click
import timm
import torch
from torch import nn

import depgraph
import pruners
from domains.measuring import timing

HEAD_DIM = 64


def small_from_scratch(name: str, macs: int) -> nn.Module:
    """A model of that timm name, of other width, that costs as many MACs as may be."""
    example = torch.zeros(1, 3, 224, 224)
    candidates = []
    for heads in range(1, 13):
        for quarters in range(10, 26, 1):
            arguments: dict[str, Any] = {
                "embed_dim": HEAD_DIM * heads,
                "num_heads": heads,
                "mlp_ratio": quarters / 4,
            }
            # of the blocks: they are all but a few percent of it
            width, hidden = HEAD_DIM * heads, int(HEAD_DIM * heads * quarters / 4)
            cost = 12 * (197 * (4 * width**2 + 2 * width * hidden) + 2 * 197**2 * width)
            cost += 196 * 768 * width + 1000 * width
            candidates.append((abs(cost / macs - 1) + 0.002 * abs(quarters / 4 - 4), arguments))
    _, chosen = min(candidates, key=lambda item: item[0])
    model = timm.create_model(name, **chosen).eval()
    click.echo(
        f"from scratch: {chosen}, {depgraph.count_macs(model, example) / macs:.3f} of the MACs",
        err=True,
    )
    return model


def compare(
    name: str, budget: dict[str, Any], batch: int, seconds: float, metric: str, file: str | None
) -> dict[str, Any]:
    """One row: speed-ups over dense, and what they are of the MACs that were saved."""
    model = timm.create_model(name).eval()
    example = torch.zeros(1, 3, 224, 224)
    dense = depgraph.count_macs(model, example)
    clock = {"batch_size": batch, "file": file, "progress": True}
    plain, plan = pruners.prune(model, example, metric, **budget)
    share = plan.macs / dense
    auto, auto_plan = pruners.prune(
        model, example, metric, target={"macs": share}, round_to="auto", latency=clock
    )
    fresh = small_from_scratch(name, plan.macs)
    macs = {
        "pruned": plan.macs,
        "pruned, auto": auto_plan.macs,
        "from scratch": depgraph.count_macs(fresh, example),
    }
    settings = timing.TimingSettings(batch, seconds=seconds, min_rounds=5, warmup_rounds=1)
    models = {"dense": model, "pruned": plain, "pruned, auto": auto, "from scratch": fresh}
    times = timing.compare(models, (3, 224, 224), settings)
    rows = {
        key: {
            "macs_kept": cost / dense,
            "latency_ms": times[key].latency_ms,
            "speedup": times[key].speedup,
            "speedup_over_macs_ratio": times[key].speedup * cost / dense,
        }
        for key, cost in macs.items()
    }
    own = rows["from scratch"]["speedup_over_macs_ratio"]
    for row in rows.values():
        row["as_fast_as_born"] = row["speedup_over_macs_ratio"] / own
    return {
        "model": name,
        **budget,
        "batch_size": batch,
        "device": times["dense"].device_name,
        "threads": times["dense"].threads,
        "dense_ms": times["dense"].latency_ms,
        **rows,
    }


@click.command()
@click.argument("names", nargs=-1)
@click.option("--ratio", "ratios", multiple=True, type=float, help="Share of units removed.")
@click.option("--macs", multiple=True, type=float, help="Share of the MACs kept  [0.5, 0.25].")
@click.option("--batch-size", "batches", multiple=True, type=int, default=(1,))
@click.option("--metric", default="l2", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of timing each row.")
@click.option("--latency-table", help="File of the table  [in the user's cache folder].")
def main(
    names: tuple[str, ...],
    ratios: tuple[float, ...],
    macs: tuple[float, ...],
    batches: tuple[int, ...],
    metric: str,
    seconds: float,
    latency_table: str | None,
) -> None:
    """Print one JSON object for each model, budget and batch size."""
    budgets: list[dict[str, Any]] = [{"ratio": ratio} for ratio in ratios]
    kept = macs or (() if ratios else (0.5, 0.25))
    budgets += [{"target": {"macs": share}} for share in kept]
    for name in names or ("vit_base_patch16_224", "deit_base_patch16_224", "beit_base_patch16_224"):
        for batch in batches:
            for budget in budgets:
                row = compare(name, budget, batch, seconds, metric, latency_table)
                click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
