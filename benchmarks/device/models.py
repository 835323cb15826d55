"""The models of all steps: dense, and cut by L2 to each budget, of random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

import depgraph
import pruners
from benchmarks.device.settings import NAMES, Settings
from benchmarks.runtimes import PRECISIONS
from cli.running.models import example_inputs
from pruners.calibration import measured_latency, with_latency
from pruners.pruning import with_defaults
from pruners.registry import make_metric
from pruners.speed.latency import LatencyModel

DENSE = "dense"


def dense_model(settings: Settings, label: str) -> nn.Module:
    """A model in eval mode on the CPU."""
    torch.manual_seed(0)
    return timm.create_model(NAMES[label], **settings.sizes.width).eval()


def shape_of(model: nn.Module) -> tuple[int, ...]:
    """Of one image."""
    return tuple(example_inputs(model).shape[1:])


def images_for(model: nn.Module, batch: int, device: str, precision: str = "fp32") -> Tensor:
    """A random batch on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape_of(model), generator=generator)
    return images.to(device, PRECISIONS[precision])


def budgets(settings: Settings) -> dict[str, dict[str, Any]]:
    """Arguments of `pruners.prune` by the name of the cut."""
    sizes = settings.sizes
    found: dict[str, dict[str, Any]] = {
        f"{share:g} of the MACs": {"target": {"macs": share}} for share in sizes.shares
    }
    return found | {f"-{ratio:.0%} of the units": {"ratio": ratio} for ratio in sizes.ratios}


def cuts(
    settings: Settings,
    model: nn.Module,
    *,
    round_to: int | str = 1,
    latency: LatencyModel | None = None,
    only: Sequence[str] | None = None,
) -> Iterator[tuple[str, nn.Module, dict[str, float]]]:
    """Cut a model, traced and scored once, to each budget.

    Parameters
    ----------
    settings : Settings
    model : nn.Module
        On the CPU.
    round_to : int or "auto"
        As in `pruners.prune`.
    latency : LatencyModel, optional
        Of this model; for ``"auto"``.
    only : sequence of str, optional
        Names of budgets.

    Yields
    ------
    tuple of (name, module, dict)
        The dict has ``params`` and ``macs_kept``.
    """
    graph = depgraph.trace(model, torch.zeros(1, *shape_of(model)))
    scorer = make_metric("l2")
    scores = pruners.score(model, graph, scorer)
    for name, budget in budgets(settings).items():
        if only is not None and name not in only:
            continue
        choices = with_defaults(scorer, **budget, round_to=round_to)
        choices = with_latency(graph, choices, latency)
        plan = graph.plan(pruners.allocate(graph, scores, **choices))
        cost = {"params": float(plan.num_params), "macs_kept": plan.macs / graph.macs}
        yield name, plan.apply(model), cost


def latency_of(settings: Settings, model: nn.Module) -> LatencyModel:
    """The latency model of this device; its table is a file in the folder of the results."""
    precision, batch, _ = settings.sizes.table
    graph = depgraph.trace(model, torch.zeros(1, *shape_of(model)))
    dtype = str(PRECISIONS[precision]).removeprefix("torch.")
    return measured_latency(
        graph,
        model=model,
        device=settings.device,
        dtype=dtype,
        batch_size=batch,
        file=settings.out / "latency-table.json",
    )
