"""Where the time of a dense and a pruned model goes, by kind of op, beside what the device can do.

``python -m benchmarks.profile vit_base_patch16_224 --ratio 0.5``. The roofline: an op cannot be
faster than its operations at the device's peak, nor than its bytes at the memory's bandwidth; both
are measured first, by a large matrix product and a large copy (Williams et al., "Roofline",
Communications of the ACM, 2009).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import prod
from typing import Any

import click
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

import depgraph
import pruners
from depgraph.work import Job, batch_atoms, work_of
from domains._memory import quiet_profiler

KINDS = {
    "linear": ("addmm", "linear", "mm"),
    "matmul": ("bmm", "baddbmm", "matmul"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "conv": ("convolution", "conv2d", "conv1d", "conv3d"),
    "norm": ("layer_norm", "native_layer_norm", "rms_norm", "batch_norm", "group_norm"),
    "softmax": ("softmax", "_softmax"),
    "gather": ("index", "gather", "embedding"),
    "copy": ("copy_", "cat", "clone", "contiguous"),
    "pointwise": ("gelu", "add", "mul", "relu", "silu", "sigmoid", "div", "sub"),
}
"""Names of ops by kind; of what is not listed, time is ``other``."""


def kind_of(op: str) -> str:
    """Kind of an op by its profiler name."""
    name = op.removeprefix("aten::").removeprefix("mkldnn_").removeprefix("cudnn_")
    for kind, names in KINDS.items():
        if name in names or any(n.startswith("_") and name.startswith(n) for n in names):
            return kind
    return "other"


def times_by_kind(model: nn.Module, images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of one forward that each kind of op takes itself."""
    cuda = images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with quiet_profiler(), torch.inference_mode():
        model(images)
        with profile(activities=activities) as profiler:
            for _ in range(rounds):
                model(images)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + spent / 1e3 / rounds
    return found


def demands(model: nn.Module, images: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Floating point operations and bytes of each kind of op, at the least."""
    p = depgraph.trace(model, images[:1]).propagation
    batch = dict.fromkeys(batch_atoms(p), len(images))
    found: dict[str, tuple[float, float]] = {}
    for work in work_of(p):
        if work.kind in ("call", "module"):
            continue
        flops, elements = _demand(work.job(batch))
        kind = _profile_kind(work.job(batch))
        before = found.get(kind, (0.0, 0.0))
        found[kind] = (before[0] + flops, before[1] + elements * images.element_size())
    return found


def _demand(job: Job) -> tuple[float, float]:
    """Operations, and elements read and written."""
    kind, fixed, sizes = job
    if kind == "linear":
        rows, inner, out = sizes
        return 2 * prod(sizes), rows * inner + inner * out + rows * out
    if kind == "matmul":
        batch, rows, inner, columns = sizes
        return 2 * prod(sizes), batch * (rows * inner + inner * columns + rows * columns)
    if kind == "attention":
        batch, heads, q, k, *dims = sizes
        both = dims[0] + dims[-1]
        return 2 * batch * heads * q * k * both, batch * heads * (q + k) * both
    if kind == "conv":
        batch, groups, inner, out, *extents = sizes
        said = json.loads(fixed)
        strides = said["stride"] * len(extents) if len(said["stride"]) == 1 else said["stride"]
        places = prod(n // s for n, s in zip(extents, strides, strict=True))
        weights = groups * inner * out * prod(said["kernel"])
        return 2 * batch * places * weights, weights + batch * groups * (
            inner * prod(extents) + out * places
        )
    return 5 * prod(sizes), 2 * prod(sizes)


def _profile_kind(job: Job) -> str:
    return (
        kind_of("aten::" + json.loads(job[1])["op"].split(".")[1]) if job[0] == "rows" else job[0]
    )


def roof(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Peak operations and bytes a second, as a large product and a large copy attain them."""
    a = torch.randn(2048, 2048).to(device, dtype)
    big = torch.empty(1 << 26, dtype=dtype, device=device)
    target = torch.empty_like(big)
    flops = 2 * 2048**3 / _seconds(lambda: a @ a, device)
    return flops, 2 * big.nbytes / _seconds(lambda: target.copy_(big), device)


def _seconds(run: Callable[[], object], device: str) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@click.command()
@click.argument("name", default="vit_base_patch16_224")
@click.option("--ratio", default=0.5, show_default=True)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--round-to", default="1", show_default=True, help="A number, or auto.")
@click.option("--json", "as_json", is_flag=True)
def main(
    name: str,
    ratio: float,
    batch_size: int,
    device: str,
    rounds: int,
    round_to: str,
    as_json: bool,
) -> None:
    """Print a table for each model, or one JSON object."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError(f"device '{device}' is not there; use cpu")
    model = timm.create_model(name).eval().to(device)
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    images = torch.randn(batch_size, *size, device=device)
    step = round_to if round_to == "auto" else int(round_to)
    small, _ = pruners.prune(model, images, "l2", ratio, round_to=step)
    flops, bandwidth = roof(device, torch.float32)
    result: dict[str, Any] = {
        "model": name,
        "peak_gflops": flops / 1e9,
        "peak_gbs": bandwidth / 1e9,
    }
    for key, made in (("dense", model), ("pruned", small)):
        needed = demands(made, images)
        rows: dict[str, dict[str, Any]] = {}
        for kind, spent in times_by_kind(made, images, rounds).items():
            operations, moved = needed.get(kind, (0.0, 0.0))
            bound = max(operations / flops, moved / bandwidth) * 1e3
            limit = "memory" if moved / bandwidth > operations / flops else "compute"
            rows[kind] = {"ms": spent, "roof_ms": bound, "bound_by": limit if bound else ""}
        result[key] = dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))
    if as_json:
        click.echo(json.dumps(result))
        return
    console = Console()
    for key in ("dense", "pruned"):
        total = sum(row["ms"] for row in result[key].values())
        table = Table(title=f"{name}, {key}: {total:.1f} ms at batch {batch_size}")
        for column in ("kind", "ms", "share", "roof ms", "of the roof", "bound by"):
            table.add_column(column)
        for kind, row in result[key].items():
            reached = f"{row['roof_ms'] / row['ms']:.0%}" if row["ms"] and row["roof_ms"] else ""
            part, roof_ms = f"{row['ms'] / total:.1%}", f"{row['roof_ms']:.2f}"
            table.add_row(kind, f"{row['ms']:.2f}", part, roof_ms, reached, row["bound_by"])
        console.print(table)


if __name__ == "__main__":
    main()
