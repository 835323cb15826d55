"""The cut of a run: the metric's, or that of a control to hold it against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pruners
from cli.options.across import across_domains
from cli.options.calibration import calibrated_with
from cli.options.latency import predicted
from cli.options.precision import with_precision
from cli.running.models import example_inputs
from cli.running.settings import RunSettings
from depgraph import DependencyGraph, DepgraphError, Plan
from domains import Split
from pruners.registry import Batch, Metric

BINS = 24
"""Of a histogram of scores."""


def pruning(
    model: nn.Module, split: Split, settings: RunSettings, share: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `pruners.prune` for a model on the device.

    Parameters
    ----------
    model : nn.Module
    split : Split
    settings : RunSettings
    share : dict
        Ratio or target, relative to this model.
    """
    images = calibrated_with(
        settings.calibration,
        settings.pruning["metric"],
        model,
        split,
        num_samples=settings.pruning.get("num_samples"),
        num_calibration=settings.pruning.get("num_calibration"),
        seed=settings.seed,
    )
    metric = pruners.make_metric(settings.pruning["metric"], seed=settings.seed)
    metric = across_domains(
        with_precision(metric, settings.device, settings.amp),
        settings.across_domains,
        model,
        split,
        num_samples=settings.pruning.get("num_samples"),
        seed=settings.seed,
    )
    return {
        **share,
        **settings.pruning,
        "example_inputs": example_inputs(model),
        "metric": metric,
        **images,
        "seed": settings.seed,
        "latency": settings.latency,
    }


def cut(
    model: nn.Module,
    dense: DependencyGraph,
    split: Split,
    settings: RunSettings,
    share: dict[str, Any],
    fresh: Callable[[], nn.Module] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the smaller model of a run, and say what is gone.

    Parameters
    ----------
    model : nn.Module
        On the device; stays as it is.
    dense : DependencyGraph
        Of the dense model, which `model` may be a part of already.
    split : Split
    settings : RunSettings
        Its `control` says whether this is a cut by a metric at all.
    share : dict
        Ratio or target, relative to `model`.
    fresh : callable, optional
        Gives the dense model with weights drawn anew; for the control "reinit" alone.

    Returns
    -------
    small : nn.Module
        On the CPU.
    record : dict
        ``"groups"``: name, kind, size and kept units of each group; ``"macs_kept"``: share of the
        MACs; ``"scores"``: by kind, a histogram of the scores of what stays and of what goes.

    Raises
    ------
    DepgraphError
        As `pruners.prune` does, and where weights cannot be drawn anew.
    """
    if settings.control == "dense":
        return copy.deepcopy(model).cpu(), _record(dense, dense.plan({}), {})
    if settings.control == "reinit" and fresh is None:
        raise DepgraphError(
            "control 'reinit' draws the weights anew, which a saved model does not tell how to; "
            "give a timm name, or leave that control out"
        )
    arguments = pruning(model, split, settings, share)
    heard = _Heard(arguments["metric"])
    small, plan = pruners.prune(model, **{**arguments, "metric": heard})
    if settings.control == "reinit" and fresh is not None:
        return plan.apply(fresh()), _record(dense, plan, {})
    said = predicted(dense, plan, settings.share, settings.latency)
    return small.cpu(), {**_record(dense, plan, heard.scores), **said}


def _record(dense: DependencyGraph, plan: Plan, scores: dict[str, Tensor]) -> dict[str, Any]:
    kinds = {group.name: group.kind for group in dense.groups}
    kept = {name: len(plan.kept_units.get(name, range(n))) for name, n in plan.sizes.items()}
    groups = [
        # a group that an earlier cut emptied is none of the plan's
        {"name": g.name, "kind": g.kind, "size": g.size, "kept": kept.get(g.name, 0)}
        for g in dense.prunable
    ]
    return {
        "groups": groups,
        "macs_kept": plan.macs / dense.macs,
        "scores": _histograms(kinds, plan, scores),
    }


def _histograms(
    kinds: dict[str, str], plan: Plan, scores: dict[str, Tensor]
) -> dict[str, dict[str, list[float]]]:
    """By kind: edges of the bins, powers of ten of a score, and how many units stay and go."""
    parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for name, values in scores.items():
        stays = torch.zeros(len(values), dtype=torch.bool)
        stays[torch.as_tensor(plan.kept_units.get(name, range(len(values))), dtype=torch.long)] = 1
        for chosen, mask in zip(
            parts.setdefault(kinds[name], ([], [])), (stays, ~stays), strict=True
        ):
            chosen.append(values.detach().cpu().double()[mask])
    out = {}
    for kind, (kept, removed) in parts.items():
        everything = torch.cat([*kept, *removed])
        positive = everything[everything > 0]
        if len(positive) == 0:
            continue
        low = float(positive.min())
        powers = [torch.cat(side).clamp_min(low).log10() for side in (kept, removed)]
        both = torch.cat(powers)
        edges = torch.linspace(float(both.min()), float(both.max()), BINS + 1)
        inner = edges[1:-1].double()
        counts = [torch.bucketize(side, inner).bincount(minlength=BINS).tolist() for side in powers]
        out[kind] = {"log10": [round(float(e), 4) for e in edges], "kept": counts[0]}
        out[kind]["removed"] = counts[1]
    return out


class _Heard:
    """A metric whose last scores can be looked at afterwards."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.name = metric.name
        self.needs_data = metric.needs_data
        self.scores: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["metric"], name)  # what only some metrics have

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One score per unit, by group name."""
        self.scores = self.metric.score(model, graph, batches)
        return self.scores
