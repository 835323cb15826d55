"""(g) DDP and FSDP 2 of a dense and a cut model, on one rank: that they train, and what they cost.

One rank sends nothing; what is shown is that pruned models can be wrapped, give the weights that
training without a wrapper gives, and how much time the wrapping takes.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.device.models import DENSE, cuts, dense_model, images_for
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings, ViT
from benchmarks.device.tables import Table, digits, padded
from domains.measuring.timing import TimingSettings, in_turns
from domains.running.sharding import whole

STEPS = 3
"""Of training, before weights are compared."""


def run(record: Record, settings: Settings) -> None:
    """Each wrapper around the dense model and around one cut."""
    backend = "nccl" if settings.cuda else "gloo"
    record.facts.update(backend=backend, ranks=1, batch=settings.sizes.batch)
    model = dense_model(settings, ViT)
    name = f"{settings.sizes.shares[0]:g} of the MACs"
    models = {DENSE: model}
    models |= {cut: small for cut, small, _ in cuts(settings, model, only=[name])}
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.FileStore(str(Path(folder) / "store"), 1)
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            for key, each in models.items():
                for how, wrap in WRAPPERS.items():
                    work = functools.partial(_trained, settings, each, wrap)
                    record.attempt(f"{how}, {key}", work)
        finally:
            distributed.destroy_process_group()


def _ddp(model: nn.Module, device: str) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: nn.Module, device: str) -> nn.Module:
    mesh = init_device_mesh(torch.device(device).type, (1,))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[nn.Module, str], nn.Module]] = {"DDP": _ddp, "FSDP 2": _fsdp}


def _trained(settings: Settings, model: nn.Module, wrap: Callable[..., nn.Module]) -> Row:
    images = images_for(model, settings.sizes.batch, settings.device)
    alone = copy.deepcopy(model).to(settings.device).train()
    wrapped = wrap(copy.deepcopy(alone), settings.device)
    steps = [_step(alone), _step(wrapped)]
    for _ in range(STEPS):
        for step in steps:
            step(images)
    off, moved = _difference(alone, wrapped), _difference(alone, model)
    clock = TimingSettings(1, seconds=settings.sizes.seconds, min_rounds=5)
    times = in_turns(steps, images, clock)
    medians = [float(value) * 1e3 for value in np.median(times, axis=0)]
    ratio = float(np.median(times[:, 1] / times[:, 0]))
    return {
        "alone_ms": medians[0],
        "wrapped_ms": medians[1],
        "ratio": ratio,
        "weights_off": off,
        "moved": moved,
    }


def _step(model: nn.Module) -> Callable[[Tensor], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(images: Tensor) -> object:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return step


def _difference(alone: nn.Module, wrapped: nn.Module) -> float:
    """The largest distance of a weight, as a part of the largest weight of its tensor."""
    own = whole(alone.state_dict())
    other = whole(wrapped.state_dict())
    off = 0.0
    for name, weight in own.items():
        theirs = other.get(name, other.get(f"module.{name}"))
        scale = max(float(weight.abs().max()), 1e-12)
        off = max(off, float((weight.cpu() - theirs.cpu()).abs().max()) / scale)
    return off


def tables(record: Record) -> list[Table]:
    """Milliseconds of a step with and without the wrapper."""
    columns = (
        "wrapper",
        "step alone, ms",
        "wrapped, ms",
        "times as long",
        "weights off by",
        "they moved by",
    )
    lines: list[tuple[str, ...]] = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        times = (digits(row["alone_ms"]), digits(row["wrapped_ms"]), f"{row['ratio']:.2f}x")
        lines.append((key, *times, f"{row['weights_off']:.1e}", f"{row['moved']:.1e}"))
    facts = record.facts
    says = ""
    if facts:
        says = (
            f"{ViT}, {facts['backend']}, {facts['ranks']} rank, batch {facts['batch']}, bfloat16 "
            f"{ViT}, {facts['backend']}, {facts['ranks']} rank, batch {facts['batch']}, bfloat16 "
            f"autocast, SGD. Weights after {STEPS} steps, beside those of the model alone, and "
            "beside those at the start."
        )
    return [Table(says, columns, lines)]
