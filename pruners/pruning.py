"""The front door: trace, score, allocate, plan and slice in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph, DepgraphError, Plan, trace
from depgraph.storing.standard import make_standard
from pruners.calibration import with_latency
from pruners.choosing.allocation import PER, allocator
from pruners.choosing.choices import AUTO
from pruners.choosing.own import own_choices
from pruners.choosing.standard import standard_allocator
from pruners.metrics.scoring import Taken, scored_on, shared_samples
from pruners.refitting.basis import align_head_dims
from pruners.refitting.compensation import compensate as refit
from pruners.registry import Batch, Metric, make_metric
from pruners.speed.latency import LatencyModel
from pruners.statistics.finite import check_weights
from pruners.statistics.gradient import Loss

DIRECTION_SAMPLES = 512
"""Samples that principal directions are taken of, at most: each needs a backward pass."""

_log = logging.getLogger(__name__)


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
    round_to: int | str | None = None,
    batches: Iterable[Batch] | None = None,
    min_units: int = 1,
    normalise: str | None = None,
    per: str | None = None,
    num_samples: int | None = None,
    compensate: bool | Literal["readers", "means"] | None = None,
    num_calibration: int | None = None,
    calibration: Iterable[Batch] | None = None,
    per_head: bool = False,
    standard: bool = False,
    seed: int = 0,
    loss: Loss | None = None,
    latency: LatencyModel | Mapping[str, Any] | None = None,
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
        See `allocator`; `round_to` is 1 by default, ``"auto"`` under a target of latency.
    normalise, per : str, optional
        See `allocator`. By default as the metric says: scores that are rises of the loss
        (``"obs"``) are ranked as they are, by what a unit saves; all others ``"unit"``, and
        ``"mean"`` unless they are made to be compared as they are (``"lamp"``: ``"none"``,
        ``"flap"``: ``"spread"``).
    batches : iterable of (inputs, targets), optional
        For metrics that need data, and for the compensation, which goes through them several times
        (a stream is kept in memory), a batch at a time.
    num_samples : int, optional
        Samples to score with, 64 by default (256 for ``"obs"``).
    compensate : bool, "readers" or "means", optional
        Turn the head dims to principal directions first (`refitting.basis`), and refit the layers
        that the cut reaches afterwards (`refitting.compensation`). By default where there are
        batches. Without it the result computes exactly what the model computes with the units
        switched off. ``"readers"``: refit the layers that lost inputs alone. ``"means"``: move
        their biases alone, so that the means of all outputs stay.
    num_calibration : int, optional
        Samples to compensate with; 256 by default, or as many as there are.
    calibration : iterable of (inputs, targets), optional
        What to compensate with in place of `batches`; the targets are not read.
    per_head : bool
        Let each head keep head dims of its own, as many as the others (`choosing.own`). Principal
        directions are each head's own already: only without compensation.
    standard : bool
        Cut so that a stock library's constructor builds the result (`depgraph.Plan.standard`): as
        many units of a kind in every block, in counts that go together; what a constructor cannot
        be told stays whole. The result is that library's model, with a configuration of its sizes,
        and carries no plan.
    seed : int
        For the random metric.
    loss : callable, optional
        ``loss(output, targets)`` for metrics that read batches; cross entropy by default.
    latency : LatencyModel or mapping, optional
        What is fast, where a target of latency, ``per="latency"`` or ``round_to="auto"`` asks for
        it: a model, or arguments of `measured_latency`. By default what is measured on the model's
        device, in its dtype, at the batch size of the example inputs.

    Returns
    -------
    small : nn.Module
        The sliced model.
    plan : Plan
        What stays, with predicted parameters and MACs.

    Raises
    ------
    DepgraphError
        For any argument out of range, and for a weight or an input that is not finite; the model is
        untouched.

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
        calibration=calibration,
        per_head=per_head,
        standard=standard,
        seed=seed,
        loss=loss,
        latency=latency,
    )
    small = cut.plan.apply(cut.model)
    if cut.calibration is not None:
        what = compensate if isinstance(compensate, str) else "all"
        refit(cut.model, small, cut.plan, cut.calibration, what=what)
    if standard:
        make_standard(small)
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
    calibration : iterable of (inputs, targets), optional
        What to compensate with; None: no compensation.
    """

    model: nn.Module
    graph: DependencyGraph
    plan: Plan
    calibration: Iterable[Batch] | None


def plan_cut(
    model: nn.Module,
    example_inputs: Any,
    metric: str | Metric = "l2",
    ratio: float | None = None,
    *,
    batches: Iterable[Batch] | None = None,
    num_samples: int | None = None,
    compensate: bool | Literal["readers", "means"] | None = None,
    num_calibration: int | None = None,
    calibration: Iterable[Batch] | None = None,
    per_head: bool = False,
    standard: bool = False,
    seed: int = 0,
    loss: Loss | None = None,
    latency: LatencyModel | Mapping[str, Any] | None = None,
    **choices: Any,
) -> PlannedCut:
    """Choose what `prune` would remove, and remove nothing.

    Parameters
    ----------
    model, example_inputs, metric, ratio, batches, num_samples, compensate, num_calibration
        As in `prune`.
    calibration, per_head, standard, seed, loss, latency
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
    given = batches is not None or calibration is not None
    compensate = given if compensate is None else compensate
    if compensate not in (True, False, "readers", "means"):
        raise DepgraphError(
            f"compensate is {compensate!r}; it must be True, False, 'readers' or 'means'"
        )
    if compensate and not given:
        raise DepgraphError("compensation needs data; pass batches, or compensate=False")
    if compensate and per_head:
        raise DepgraphError(
            "compensation turns the dims of each head by themselves already; leave per_head out, "
            "or pass compensate=False"
        )
    graph = trace(model, example_inputs)
    check_weights(model)
    if standard:
        choices = {**choices, **_of_standard(**choices)}
    choices = with_defaults(scorer, ratio=ratio, **choices)
    defaults = {"batch_size": _batch_of(example_inputs), **clock_of(model)}
    if not any(tensor.is_meta for tensor in model.parameters()):
        defaults["model"] = model
    choices = with_latency(graph, choices, latency, **defaults)
    choose = (standard_allocator if standard else allocator)(graph, **choices)  # refuses first
    if loss is not None and hasattr(scorer, "loss"):
        scorer.loss = loss
    taken: Taken | None = None
    if compensate:
        batches, taken = shared_samples(
            model, scorer, batches, calibration, num_samples, num_calibration
        )
    if compensate in (True, "readers") and taken is not None:
        model = copy.deepcopy(model)
        wanted = min(taken.wanted, DIRECTION_SAMPLES)
        few = replace(taken, wanted=wanted, exact=taken.exact and taken.wanted == wanted)
        align_head_dims(model, graph, few, seed)
    looked_at = scored_on(model, scorer, batches, num_samples)
    kept = choose(scorer.score(model, graph, looked_at))
    if per_head:
        kept = own_choices(model, graph, scorer, looked_at, kept)
    plan = graph.plan(kept, stock_scale=standard)
    if _log.isEnabledFor(logging.INFO):
        params, macs = plan.num_params / graph.num_params, plan.macs / graph.macs
        said = scorer.name, 100 * params, 100 * macs
        _log.info("cut by %s: %.1f%% of the parameters stay, %.1f%% of the MACs", *said)
    return PlannedCut(model, graph, plan, taken)


def _of_standard(
    scope: str = "global", per: str | None = None, round_to: int | str | None = None, **_: Any
) -> dict[str, Any]:
    """What `standard` makes of arguments that compare groups."""
    if scope == "isomorphic" or per not in (None, "unit"):
        raise DepgraphError(
            "standard keeps as many units in every block; leave out scope and per, or standard"
        )
    return {"scope": "uniform", "per": "unit", "round_to": 1 if round_to is None else round_to}


def with_defaults(
    scorer: Metric,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    scope: str = "global",
    normalise: str | None = None,
    per: str | None = None,
    round_to: int | str | None = None,
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
        per = next((what for what in target or () if what in PER), "macs") if by_cost else "unit"
    if round_to is None:
        round_to = AUTO if "latency" in (target or {}) else 1
    said = {"ratio": ratio, "target": target, "scope": scope, "normalise": normalise, "per": per}
    return {**said, "round_to": round_to, **others}


def _batch_of(example_inputs: Any) -> int:
    """Samples that example inputs hold."""
    leaves = pytree.tree_leaves(
        dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    )
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def clock_of(model: nn.Module) -> dict[str, str]:
    """Device and dtype that a model would be timed in."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if first is None or first.is_meta else first.device
    dtype = torch.float32 if first is None else first.dtype
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
