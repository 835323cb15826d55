"""What the ops of a model need at the least, and what a device can do.

An op cannot be faster than its operations at the device's peak, nor than its bytes at the memory's
bandwidth; both are measured, by a large matrix product and a large copy (Williams et al.,
"Roofline", Communications of the ACM, 2009).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import prod

import torch
from torch import nn

import depgraph
from depgraph.costing.work import Job, batch_atoms, work_of

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


Demands = dict[str, tuple[float, float]]
"""Floating point operations and bytes by kind of op."""


def demands(model: nn.Module, images: torch.Tensor) -> Demands:
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
