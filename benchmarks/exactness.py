"""The table of the base models at 50, 75 and 95%: size, speed, difference from the masked model.

``python -m benchmarks.exactness``. Every row prunes by L2, global, then compares the sliced model
of random plans, unequal from block to block, with the original with the removed units off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import timm
import torch
from rich.console import Console
from rich.progress import track

import depgraph
import pruners
from benchmarks.pages import markdown_table
from cli.output import table, write_text
from domains.measuring import timing
from tests.reference import (
    masked,
    measured_macs,
    measured_params,
    random_units,
    randomise,
    relative_difference,
)

MODELS = (
    "vit_base_patch16_224",
    "deit_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
)
_HEADING = """# Sliced against masked

Made by `python -m benchmarks.exactness --markdown docs/exactness.md`: L2 over all units, random
weights; speed on this CPU at batch 1, both models in turns; largest relative difference in float32
of the sliced model from the original with the removed units switched off, over 20 random plans."""

COLUMNS = (
    "model",
    "removed",
    "groups",
    "params, M",
    "MACs, G",
    "MACs kept",
    "speed-up",
    "speed-up x MACs",
    "largest difference",
)


@torch.no_grad()
def row(
    name: str, ratio: float, plans: int, seconds: float, batch: int, round_to: int
) -> dict[str, Any]:
    """One model at one ratio.

    Parameters
    ----------
    name : str
        timm model, random weights: no published figure depends on them.
    ratio : float
        Share of units removed.
    plans : int
        Random plans to compare.
    seconds : float
        Time to measure the speed-up for.
    batch : int
        Images a batch.
    round_to : int
        Groups keep multiples of this.

    Returns
    -------
    dict
    """
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    graph = depgraph.trace(model, images)
    small, plan = pruners.prune(model, images, "l2", ratio, round_to=round_to)
    settings = timing.TimingSettings(batch_size=batch, seconds=seconds)
    times = timing.compare({"dense": model, "pruned": small}, (3, 224, 224), settings)
    result = {
        "model": name,
        "ratio": ratio,
        "groups": len(graph.prunable),
        "params": plan.num_params,
        "params_measured": measured_params(small),
        "macs": plan.macs,
        "macs_measured": measured_macs(small, images),
        "macs_kept": plan.macs / graph.macs,
        "speedup": times["pruned"].speedup,
        "speedup_over_macs": times["pruned"].speedup * plan.macs / graph.macs,
        "plans": plans,
    }
    randomise(model)
    worst = 0.0
    for seed in range(plans):
        random = graph.plan(random_units(graph, seed, ratio))
        got, expected = random.apply(model)(images), masked(model, random)(images)
        worst = max(worst, relative_difference(got, expected))
    return {**result, "largest_difference": worst}


@click.command()
@click.option("--model", "models", multiple=True, default=MODELS)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.5, 0.75, 0.95))
@click.option("--plans", default=20, show_default=True, help="Random plans a row.")
@click.option("--seconds", default=10.0, show_default=True, help="Timing a row.")
@click.option("--batch-size", default=1, show_default=True)
@click.option("--round-to", default=1, show_default=True, help="Keep multiples of this.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False))
def main(
    models: tuple[str, ...],
    ratios: tuple[float, ...],
    plans: int,
    seconds: float,
    batch_size: int,
    round_to: int,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Print the table."""
    todo = [(name, ratio) for name in models for ratio in ratios]
    progress = track(todo, console=Console(stderr=True), description="models")
    rows = [row(name, ratio, plans, seconds, batch_size, round_to) for name, ratio in progress]
    if as_json:
        click.echo(json.dumps(rows))
    cells = [_cells(r) for r in rows]
    if markdown is not None:
        write_text(markdown, f"{_HEADING}\n\n{markdown_table(COLUMNS, cells)}")
    if not as_json:
        Console().print(table("sliced against masked", COLUMNS, cells))


def _cells(r: dict[str, Any]) -> list[str]:
    same = r["params"] == r["params_measured"] and r["macs"] == r["macs_measured"]
    return [
        r["model"],
        f"{r['ratio']:.0%}",
        str(r["groups"]),
        f"{r['params'] / 1e6:.2f}{'' if same else ' (predicted wrong)'}",
        f"{r['macs'] / 1e9:.3f}",
        f"{r['macs_kept']:.3f}",
        f"{r['speedup']:.2f}x",
        f"{r['speedup_over_macs']:.2f}",
        f"{r['largest_difference']:.1e}",
    ]


if __name__ == "__main__":
    main()
