"""Latency of pruned models, in turns with the dense ones, over devices, precisions and runtimes.

``pytest benchmarks --benchmark-only`` runs a part of the grid in minutes; ``--model``, ``--ratio``,
``--batch``, ``--device``, ``--precision`` and ``--runtime`` choose another, ``--full`` all of it.
The speed-ups, which are taken within one run, are in each benchmark's ``extra_info``. What is not
to be had here is skipped, with the reason.

To compare commits: ``pytest benchmarks --benchmark-only --benchmark-json before.json``, then after
the change ``... --benchmark-compare before.json``; or ``pytest-benchmark compare *.json``.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import depgraph
import pruners
from benchmarks.runtimes import PRECISIONS, NotHere, make
from domains.measuring import timing


@cache
def dense(name: str) -> tuple[nn.Module, int]:
    """A timm model with random weights, and its MACs."""
    model = timm.create_model(name).eval()
    return model, depgraph.count_macs(model, torch.zeros(1, 3, 224, 224))


@cache
def pruned(name: str, ratio: float) -> tuple[nn.Module, int]:
    """The same with a share of its units removed."""
    small, plan = pruners.prune(dense(name)[0], torch.zeros(1, 3, 224, 224), "l2", ratio)
    return small, plan.macs


def test_latency(
    benchmark: Any,
    request: pytest.FixtureRequest,
    model: str,
    ratio: str,
    batch: str,
    device: str,
    precision: str,
    runtime: str,
) -> None:
    """The pruned model: pytest-benchmark's own statistics, and the speed-up in turns."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    images = torch.randn(int(batch), 3, 224, 224).to(device, PRECISIONS[precision])
    (whole, dense_macs), (small, macs) = dense(model), pruned(model, float(ratio))
    seconds = request.config.getoption("--seconds")
    settings = timing.TimingSettings(int(batch), device, seconds=seconds, min_rounds=5)
    # `no_grad`: exporters refuse inference tensors
    with torch.no_grad():
        try:
            runs = [make(runtime, _placed(m, images), images) for m in (whole, small)]
        except NotHere as reason:
            pytest.skip(str(reason))
        times = timing.in_turns(runs, images, settings)
        benchmark.extra_info.update(
            params=sum(p.numel() for p in small.parameters()),
            macs=macs,
            dense_ms=float(np.median(times[:, 0])) * 1e3,
            pruned_ms=float(np.median(times[:, 1])) * 1e3,
            speedup=float(np.median(times[:, 0] / times[:, 1])),
            speedup_over_macs=float(np.median(times[:, 0] / times[:, 1])) * macs / dense_macs,
        )

        def forward() -> None:
            runs[1](images)
            if images.is_cuda:
                torch.cuda.synchronize()

        benchmark.pedantic(forward, rounds=5, iterations=1, warmup_rounds=1)


def _placed(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The model itself where it fits the images, else a copy that does."""
    if images.device.type == "cpu" and images.dtype == torch.float32:
        return model
    return copy.deepcopy(model).to(images.device, images.dtype)
