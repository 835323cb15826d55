"""The front door: trace, score, allocate, plan and slice in one call."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError, Plan, trace
from pruners.allocation import allocator
from pruners.basis import align_head_dims
from pruners.compensation import compensate as refit
from pruners.gradient import Loss
from pruners.metrics import Batch, Metric, make_metric

DEFAULT_SAMPLES = 64
"""Samples that a metric with data looks at, unless told otherwise or it asks for more."""

CALIBRATION_SAMPLES = 256
"""Samples that the compensation is fitted to, where there are as many."""


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
    normalise: str | None = None,
    per: str | None = None,
    num_samples: int | None = None,
    compensate: bool | None = None,
    num_calibration: int | None = None,
    seed: int = 0,
    loss: Loss | None = None,
) -> tuple[nn.Module, Plan]:
    """Make a smaller model.

    Parameters
    ----------
    model : nn.Module
        Stays as it is, on its device and in its mode.
    example_inputs : Tensor, tuple of Tensors, or mapping of str to Tensor
        What the model is called with; only shapes matter.
    metric : str or Metric
        See `METRICS`; ``"l2"`` by default. `DomainAware` scores source domains apart.
    ratio : float
        Share of the prunable units that is removed; 0.5 where there is no target.
    target, scope, kinds, ignore, round_to, min_units
        See `allocator`.
    normalise, per : str, optional
        See `allocator`. By default as the metric says: scores that are rises of the loss
        (``"obs"``) are ranked as they are, by what a unit saves; all others ``"unit"``, and
        ``"mean"`` unless they are made to be compared as they are (``"lamp"``: ``"none"``,
        ``"flap"``: ``"spread"``).
    batches : iterable of (inputs, targets), optional
        For metrics that need data, and for the compensation.
    num_samples : int, optional
        Samples to score with, 64 by default (256 for ``"obs"``).
    compensate : bool, optional
        Turn the head dims to principal directions first (`pruners.basis`), and refit what reads the
        units that stay afterwards (`pruners.compensation`). By default where there are batches.
        Without it the result computes exactly what the model computes with the units switched off.
    num_calibration : int, optional
        Samples to compensate with; 256 by default, or as many as there are.
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
    cut = plan_cut(
        model,
        example_inputs,
        metric,
        ratio,
        target=target,
        scope=scope,
        kinds=kinds,
        ignore=ignore,
        round_to=round_to,
        batches=batches,
        min_units=min_units,
        normalise=normalise,
        per=per,
        num_samples=num_samples,
        compensate=compensate,
        num_calibration=num_calibration,
        seed=seed,
        loss=loss,
    )
    small = cut.plan.apply(cut.model)
    if cut.calibration:
        refit(cut.model, small, cut.plan, cut.calibration)
    return small, cut.plan


@dataclass(frozen=True)
class PlannedCut:
    """What `prune` is about to cut.

    Attributes
    ----------
    model : nn.Module
        That the plan is for: the model itself, or with compensation a copy that computes the same
        with its head dims turned to principal directions.
    graph : DependencyGraph
    plan : Plan
    calibration : list of (inputs, targets)
        What to compensate with; empty: no compensation.
    """

    model: nn.Module
    graph: DependencyGraph
    plan: Plan
    calibration: list[Batch]


def plan_cut(
    model: nn.Module,
    example_inputs: Any,
    metric: str | Metric = "l2",
    ratio: float | None = None,
    *,
    batches: Iterable[Batch] | None = None,
    num_samples: int | None = None,
    compensate: bool | None = None,
    num_calibration: int | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    **choices: Any,
) -> PlannedCut:
    """Choose what `prune` would remove, and remove nothing.

    Parameters
    ----------
    model, example_inputs, metric, ratio, batches, num_samples, compensate, num_calibration
        As in `prune`.
    seed, loss
        As in `prune`.
    **choices
        The other arguments of `prune`.

    Returns
    -------
    PlannedCut

    Raises
    ------
    DepgraphError
        As `prune`.
    """
    scorer = make_metric(metric, seed=seed)
    compensate = batches is not None if compensate is None else compensate
    if compensate and batches is None:
        raise DepgraphError("compensation needs data; pass batches, or compensate=False")
    graph = trace(model, example_inputs)
    choose = allocator(graph, **with_defaults(scorer, ratio=ratio, **choices))  # refuses first
    if loss is not None and hasattr(scorer, "loss"):
        scorer.loss = loss
    calibration: list[Batch] = []
    if compensate and batches is not None:
        batches, calibration = _shared(model, scorer, batches, num_samples, num_calibration)
        model = copy.deepcopy(model)
        align_head_dims(model, graph, calibration, seed)
    scores = score(model, graph, scorer, batches, num_samples=num_samples)
    return PlannedCut(model, graph, graph.plan(choose(scores)), calibration)


def with_defaults(
    scorer: Metric,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    scope: str = "global",
    normalise: str | None = None,
    per: str | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Arguments of `allocator`, what was not said filled in as suits the metric."""
    additive = bool(getattr(scorer, "additive", False))
    if ratio is None and target is None:
        ratio = 0.5
    if normalise is None:
        normalise = getattr(scorer, "normalise", None) or ("none" if additive else "mean")
    if per is None:
        by_cost = additive and normalise == "none" and scope == "global"
        per = ("params" if "params" in (target or {}) else "macs") if by_cost else "unit"
    said = {"ratio": ratio, "target": target, "scope": scope, "normalise": normalise, "per": per}
    return {**said, **others}


def _shared(
    model: nn.Module,
    scorer: Metric,
    batches: Iterable[Batch],
    num_samples: int | None,
    num_calibration: int | None,
) -> tuple[list[Batch], list[Batch]]:
    """What the metric and what the compensation look at, from batches that are read once."""
    device = _device(model)
    scoring = (num_samples or samples_wanted(scorer)) if scorer.needs_data else 0
    calibrating = CALIBRATION_SAMPLES if num_calibration is None else num_calibration
    if calibrating < 1:
        raise DepgraphError(f"num_calibration is {num_calibration}; it must be at least 1")
    taken = take_samples(batches, max(scoring, calibrating), device, exact=False)
    count = sum(len(targets) for _, targets in taken)
    if num_calibration is not None and count < num_calibration:
        raise DepgraphError(
            f"the batches hold {count} samples, fewer than num_calibration={num_calibration}"
        )
    return taken, take_samples(taken, calibrating, device, exact=False)


def samples_wanted(scorer: Metric) -> int:
    """Samples that a metric looks at when nothing is said."""
    return int(getattr(scorer, "num_samples", DEFAULT_SAMPLES))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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
        Samples to use; by default `DEFAULT_SAMPLES`, or what the metric asks for.
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
        wanted = samples_wanted(scorer) if num_samples is None else num_samples
        taken = take_samples(batches, wanted, _device(model), exact=num_samples is not None)
    return scorer.score(model, graph, taken)


def take_samples(
    batches: Iterable[Batch], wanted: int, device: torch.device, exact: bool
) -> list[Batch]:
    """The first batches that together hold a number of samples, on a device.

    Parameters
    ----------
    batches : iterable of (inputs, targets)
    wanted : int
        Samples to take.
    device : torch.device
    exact : bool
        Whether there have to be as many; otherwise fewer will do.

    Returns
    -------
    list of (inputs, targets)

    Raises
    ------
    DepgraphError
        When a batch has another form, or there are too few samples.
    """
    if wanted < 1:
        raise DepgraphError(f"num_samples is {wanted}; it must be at least 1")
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
    if exact:
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
