"""Latency of the base models with 0, 50, 75 and 95% of their units removed, in turns with dense.

``pytest benchmarks --benchmark-only``; the speed-ups, which are taken within one run, are in each
benchmark's ``extra_info``. CUDA cases are skipped, visibly, where there is no device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import nn

import depgraph
import pruners
from domains import timing

MODELS = (
    "vit_base_patch16_224",
    "deit_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]


@cache
def dense(name: str) -> nn.Module:
    """A timm model with random weights."""
    return timm.create_model(name).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("name", MODELS)
def test_latency(benchmark: Any, name: str, ratio: float, batch: int, device: str) -> None:
    """One model at one ratio: pytest-benchmark's own statistics, and the speed-up in turns."""
    model = dense(name)
    example = torch.zeros(1, 3, 224, 224)
    small, macs = model, depgraph.trace(model, example).macs
    whole = macs
    if ratio:
        small, plan = pruners.prune(model, example, "l2", ratio)
        macs = plan.macs
    settings = timing.TimingSettings(batch_size=batch, device=device, seconds=2.0, min_rounds=5)
    turns = timing.compare({"dense": model, "pruned": small}, (3, 224, 224), settings)["pruned"]
    benchmark.extra_info.update(
        params=sum(p.numel() for p in small.parameters()),
        macs=macs,
        speedup=turns.speedup,
        speedup_over_macs=turns.speedup * macs / whole,
        peak_memory_bytes=turns.peak_memory_bytes,
    )
    small = small.to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)

    def forward() -> None:
        with torch.inference_mode():
            small(images)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(forward, rounds=5, iterations=1, warmup_rounds=1)
    small.cpu()
