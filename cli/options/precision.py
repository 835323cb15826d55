"""Mixed precision for what `--amp` does not reach by itself: scoring and timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pruners
from depgraph import DependencyGraph
from pruners.registry import Batch, Metric


def half(amp: bool, device: str) -> str | None:
    """The name of the half precision that training takes on a device too; None without `amp`."""
    if not amp:
        return None
    old_gpu = device.startswith("cuda") and not torch.cuda.is_bf16_supported()
    return "fp16" if old_gpu else "bf16"


def with_precision(metric: Metric, device: str, amp: bool) -> Metric:
    """The metric, scoring under autocast if `amp` is asked for and it runs the model at all.

    Parameters
    ----------
    metric : Metric
    device : str
    amp : bool

    Returns
    -------
    Metric

    Notes
    -----
    Only the scoring: under autocast a trace would record casts that the model does not have.
    """
    precision = half(amp, device)
    if precision is None or not metric.needs_data:
        return metric
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return _Autocast(
        metric.name,
        True,
        bool(getattr(metric, "additive", False)),
        getattr(metric, "normalise", None),
        pruners.samples_wanted(metric),
        metric,
        device,
        dtype,
    )


@dataclass
class _Autocast:
    """A metric whose forward and backward run in mixed precision."""

    name: str
    needs_data: bool
    additive: bool
    normalise: str | None
    num_samples: int
    metric: Metric
    device: str
    dtype: torch.dtype

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One score per unit, by group name."""
        with torch.autocast(torch.device(self.device).type, dtype=self.dtype):
            return self.metric.score(model, graph, batches)
