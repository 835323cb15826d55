"""Where the time of a dense and of pruned models goes, by kind of op, beside their roofline.

``python -m benchmarks.profile vit_base_patch16_224 --batch-size 1``; ``--markdown`` makes a page.
Beside the dense model: pruned, pruned to sizes that the device is fast at, that one folded as
`export` folds it, and a model from scratch (`benchmarks.from_scratch`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import depgraph
import pruners
from benchmarks.from_scratch import small_from_scratch
from benchmarks.pages import markdown_table, png
from benchmarks.roofline import Demands, demands, kind_of, roof
from cli.output import table, write_bytes, write_text
from depgraph.exporting.export import export_program
from domains.measuring.memory import quiet_profiler
from domains.measuring.timing import device_name

Times = dict[str, float]
"""Milliseconds of one forward by kind of op."""

COLUMNS = ("kind", "ms", "share", "roof, ms", "of the roof", "bound by")


def times_by_kind(model: Callable[[Tensor], object], images: Tensor, rounds: int) -> Times:
    """Milliseconds of one forward that each kind of op takes itself, the least of some rounds."""
    cuda = images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    found: list[Times] = []
    with quiet_profiler(), torch.inference_mode():
        model(images)
        for _ in range(rounds):
            with profile(activities=activities) as profiler:
                model(images)
            times: Times = {}
            # Kernels have rows of their own too: an op's row holds what its kernels took.
            ops = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
            for event in ops:
                spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                kind = kind_of(event.key)
                times[kind] = times.get(kind, 0.0) + spent / 1e3
            found.append(times)
    return min(found, key=lambda times: sum(times.values()))


def variants(
    model: nn.Module, name: str, images: Tensor, ratio: float, latency_table: str | None
) -> dict[str, tuple[Callable[[Tensor], object], Demands]]:
    """The models of one row of the page, with what they need."""
    cut: dict[str, Any] = {"example_inputs": images[:1], "metric": "l2"}
    small, plan = pruners.prune(model, **cut, ratio=ratio)
    share = plan.macs / depgraph.count_macs(model, images[:1])
    clock = {"batch_size": len(images), "device": str(images.device), "file": latency_table}
    auto, _ = pruners.prune(
        model, **cut, target={"macs": share}, round_to="auto", latency={**clock, "progress": True}
    )
    folded = export_program(auto, images[:1])[0].module()
    made: dict[str, nn.Module] = {
        "dense": model,
        "pruned": small,
        "pruned, auto": auto,
        "from scratch": small_from_scratch(name, plan.macs).to(images.device),
    }
    found: dict[str, tuple[Callable[[Tensor], object], Demands]] = {}
    for key, variant in made.items():
        found[key] = variant, demands(variant, images)
        if key == "pruned, auto":
            found["pruned, auto, folded"] = folded, found[key][1]
    return found


def rows_of(
    times: Times, needed: Demands, flops: float, bandwidth: float
) -> dict[str, dict[str, Any]]:
    """By kind of op, the longest first: time, the least that it could be, and why."""
    rows = {}
    for kind, spent in sorted(times.items(), key=lambda item: -item[1]):
        operations, moved = needed.get(kind, (0.0, 0.0))
        bound = max(operations / flops, moved / bandwidth) * 1e3
        limit = "memory" if moved / bandwidth > operations / flops else "compute"
        rows[kind] = {"ms": spent, "roof_ms": bound, "bound_by": limit if bound else ""}
    return rows


def lines_of(rows: dict[str, dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """The same as a table."""
    total = sum(row["ms"] for row in rows.values())
    for kind, row in rows.items():
        reached = f"{row['roof_ms'] / row['ms']:.0%}" if row["ms"] and row["roof_ms"] else ""
        share, least = f"{row['ms'] / total:.1%}", f"{row['roof_ms']:.2f}"
        yield kind, f"{row['ms']:.2f}", share, least, reached, row["bound_by"]


def title_of(result: dict[str, Any], key: str) -> str:
    """What a table is of."""
    total = sum(row["ms"] for row in result["models"][key].values())
    return f"{result['model']}, {key}, batch {result['batch_size']}: {total:.1f} ms"


def _plot(results: list[dict[str, Any]]) -> bytes:
    """Bars of time by kind of op, a bar for each model; a tick where its roof is."""
    figure = Figure(figsize=(9, 0.9 + 1.9 * len(results)))
    panels = figure.subplots(len(results), squeeze=False)[:, 0]
    kinds = list(dict.fromkeys(k for r in results for rows in r["models"].values() for k in rows))
    for axes, result in zip(panels, results, strict=True):
        names = list(result["models"])[::-1]
        left = [0.0] * len(names)
        for number, kind in enumerate(kinds):
            spent = [result["models"][n].get(kind, {"ms": 0.0})["ms"] for n in names]
            axes.barh(names, spent, left=left, color=f"C{number}", label=kind)
            left = [a + b for a, b in zip(left, spent, strict=True)]
        roofs = [sum(row["roof_ms"] for row in result["models"][n].values()) for n in names]
        axes.plot(roofs, names, "k|", markersize=16, markeredgewidth=2, label="roof")
        axes.set(title=f"{result['model']}, batch {result['batch_size']}", xlabel="ms")
    panels[0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


def _markdown(results: list[dict[str, Any]], ratio: float, command: str) -> str:
    first = results[0]
    parts = [
        "# Where the time goes\n\n"
        f"Made by `{command}`. Milliseconds of one forward in torch, by kind of op, float32, on "
        f"{first['device']} ({first['threads']} threads), torch {torch.__version__}. Random "
        f"weights; pruned by L2 of {ratio:.0%} of the units, *auto* to the same MACs in sizes "
        "that the device is fast at, *folded* as `export` writes it, *from scratch* a timm model "
        "of those MACs. The roof is the least that the sums and the memory allow: "
        f"{first['peak_gflops']:.0f} GFLOP/s and {first['peak_gbs']:.0f} GB/s were measured by a "
        "large product and a large copy.\n\n![Time by kind of op](profile.png)\n"
    ]
    for result in results:
        for key, rows in result["models"].items():
            parts.append(f"\n{title_of(result, key)}\n\n{markdown_table(COLUMNS, lines_of(rows))}")
    return "".join(parts)


def measure(
    name: str, ratio: float, batch: int, device: str, rounds: int, latency_table: str | None
) -> dict[str, Any]:
    """The times of all models at one batch size, and what the device can do."""
    model: Any = timm.create_model(name).eval().to(device)
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    images = torch.randn(batch, *size, device=device)
    flops, bandwidth = roof(device, torch.float32)
    models = {
        key: rows_of(times_by_kind(run, images, rounds), needed, flops, bandwidth)
        for key, (run, needed) in variants(model, name, images, ratio, latency_table).items()
    }
    return {
        "model": name,
        "batch_size": batch,
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "peak_gflops": flops / 1e9,
        "peak_gbs": bandwidth / 1e9,
        "models": models,
    }


@click.command()
@click.argument("names", nargs=-1)
@click.option("--ratio", default=0.5, show_default=True, help="Share of units removed.")
@click.option("--batch-size", "batches", multiple=True, type=int, default=(1,), show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="The fastest counts.")
@click.option("--latency-table", help="File of the table  [in the user's cache folder].")
@click.option("--json", "as_json", is_flag=True)
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="With a plot.")
def main(
    names: tuple[str, ...],
    ratio: float,
    batches: tuple[int, ...],
    device: str,
    rounds: int,
    latency_table: str | None,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Print a table for each model and batch size, or one JSON list."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError(f"device '{device}' is not there; use cpu")
    names = names or ("vit_base_patch16_224",)
    results = [
        measure(name, ratio, batch, device, rounds, latency_table)
        for name in names
        for batch in batches
    ]
    if markdown is not None:
        said = " ".join([*names, *(f"--batch-size {b}" for b in batches), f"--ratio {ratio}"])
        command = f"python -m benchmarks.profile {said} --markdown {markdown}"
        write_bytes(markdown.with_suffix(".png"), _plot(results))
        write_text(markdown, _markdown(results, ratio, command))
    if as_json:
        click.echo(json.dumps(results))
        return
    for result in results:
        for key, rows in result["models"].items():
            Console().print(table(title_of(result, key), COLUMNS, list(lines_of(rows))))


if __name__ == "__main__":
    main()
