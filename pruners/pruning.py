"""The front door: trace, score, allocate, plan and slice in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError, Plan, trace
from pruners.allocation import (
    NORMALISATIONS,
    SCOPES,
    allocate,
    check_choice,
    check_limits,
    choose_groups,
)
from pruners.gradient import Loss
from pruners.metrics import Batch, Metric, make_metric

DEFAULT_SAMPLES = 64
"""Samples that a metric with data looks at, unless told otherwise."""


def prune(
    model: nn.Module,
    example_inputs: Any,
    metric: str | Metric = "l2",
    ratio: float | None = None,
    *,
    target: Mapping[str, float] | None = None,
    scope: str = "global",
    kinds: Iterable[str] | None = None,
    ignore: Sequence[str] = (),
    round_to: int = 1,
    batches: Iterable[Batch] | None = None,
    min_units: int = 1,
    normalise: str = "mean",
    num_samples: int | None = None,
    seed: int = 0,
    loss: Loss | None = None,
) -> tuple[nn.Module, Plan]:
    """Make a smaller model.

    Parameters
    ----------
    model : nn.Module
        Stays as it is, on its device and in its mode.
    example_inputs : Tensor or tuple of Tensors
        What the model is called with; only shapes matter.
    metric : str or Metric
        See `METRICS`; ``"l2"`` by default.
    ratio : float
        Share of the prunable units that is removed; 0.5 where there is no target.
    target, scope, kinds, ignore, round_to, min_units, normalise
        See `allocate`.
    batches : iterable of (inputs, targets), optional
        For metrics that need data; as many are taken as hold `num_samples`.
    num_samples : int, optional
        Samples to score with, 64 by default.
    seed : int
        For the random metric.
    loss : callable, optional
        ``loss(output, targets)`` for metrics with data; cross entropy by default.

    Returns
    -------
    small : nn.Module
        The sliced model.
    plan : Plan
        What stays, with predicted parameters and MACs.

    Raises
    ------
    DepgraphError
        For any argument out of range; the model is untouched.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> small, plan = prune(model, torch.randn(1, 4), "l1", 0.25)
    >>> small[0].out_features, plan.num_params
    (6, 44)
    """
    if ratio is None and target is None:
        ratio = 0.5
    if ratio is not None and not 0 < ratio < 1:
        raise DepgraphError(f"ratio is {ratio}; the share removed must lie between 0 and 1")
    check_choice("scope", scope, SCOPES)
    check_choice("normalise", normalise, NORMALISATIONS)
    check_limits(min_units, round_to)
    kinds = kinds if kinds is None or isinstance(kinds, str) else tuple(kinds)
    graph = trace(model, example_inputs)
    choose_groups(graph, kinds, ignore)  # refuses before any scoring
    scorer = make_metric(metric, seed=seed)
    if loss is not None and hasattr(scorer, "loss"):
        scorer.loss = loss
    scores = score(model, graph, scorer, batches, num_samples=num_samples)
    kept = allocate(
        graph,
        scores,
        ratio=ratio,
        target=target,
        scope=scope,
        kinds=kinds,
        ignore=ignore,
        round_to=round_to,
        min_units=min_units,
        normalise=normalise,
    )
    plan = graph.plan(kept)
    return plan.apply(model), plan


def score(
    model: nn.Module,
    graph: DependencyGraph,
    metric: str | Metric,
    batches: Iterable[Batch] | None = None,
    *,
    num_samples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of every unit of every prunable group.

    Parameters
    ----------
    model : nn.Module
    graph : DependencyGraph
        Of this model.
    metric : str or Metric
    batches : iterable of (inputs, targets), optional
    num_samples : int, optional
        Samples to use, `DEFAULT_SAMPLES` by default.
    seed : int
        For the random metric.

    Returns
    -------
    dict of str to Tensor (group.size,)

    Raises
    ------
    DepgraphError
        When the metric needs data and there is none, or less than asked for.
    """
    scorer = make_metric(metric, seed=seed)
    taken: list[Batch] = []
    if scorer.needs_data:
        if batches is None:
            raise DepgraphError(
                f"metric '{scorer.name}' needs data; pass batches=[(inputs, targets), ...]"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        taken = take_samples(batches, num_samples, device)
    return scorer.score(model, graph, taken)


def take_samples(
    batches: Iterable[Batch], num_samples: int | None, device: torch.device
) -> list[Batch]:
    """The first batches that together hold a number of samples, on a device.

    Parameters
    ----------
    batches : iterable of (inputs, targets)
    num_samples : int or None
        None takes up to `DEFAULT_SAMPLES`; a number given has to be there.
    device : torch.device

    Returns
    -------
    list of (inputs, targets)

    Raises
    ------
    DepgraphError
        When a batch has another form, or there are too few samples.
    """
    wanted = DEFAULT_SAMPLES if num_samples is None else num_samples
    if wanted < 1:
        raise DepgraphError(f"num_samples is {num_samples}; it must be at least 1")
    taken: list[Batch] = []
    count = 0
    for batch in batches:
        inputs, targets = _checked(batch)
        size = min(len(targets), wanted - count)
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        moved = tuple(x[:size].to(device) for x in args)
        taken.append((moved if len(moved) > 1 else moved[0], targets[:size].to(device)))
        count += size
        if count == wanted:
            return taken
    if count == 0:
        raise DepgraphError("the batches hold no sample; pass at least one (inputs, targets)")
    if num_samples is not None:
        raise DepgraphError(f"the batches hold {count} samples, fewer than num_samples={wanted}")
    return taken


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DepgraphError("each batch must be a pair (inputs, targets) with targets a Tensor")
    inputs, targets = batch
    first = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
    if not isinstance(first, Tensor) or first.dim() == 0 or len(first) != len(targets):
        raise DepgraphError("each batch must hold as many inputs as targets, as Tensors")
    return inputs, targets
