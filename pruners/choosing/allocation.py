"""From scores to the units that stay, under a ratio or a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from depgraph import DependencyGraph, DepgraphError, Group
from pruners.choosing.choices import (
    AUTO,
    NORMALISATIONS,
    Unreachable,
    block_sizes,
    check_choice,
    check_limits,
    choose_groups,
    kind_choices,
    normalised,
)
from pruners.choosing.descent import descend
from pruners.choosing.goal import Goal
from pruners.speed.latency import LatencyModel

SCOPES = ("global", "uniform", "isomorphic")
PER = ("unit", "macs", "params", "latency")
"""What scores are divided by when units are ranked: nothing, or what a unit saves."""


def allocator(
    graph: DependencyGraph,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    scope: str = "global",
    kinds: Iterable[str] | None = None,
    ignore: Sequence[str] = (),
    round_to: int | str = 1,
    min_units: int = 1,
    normalise: str = "mean",
    floor: float = 0.5,
    per: str = "unit",
    latency: LatencyModel | None = None,
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """How to choose the units that stay, with everything but the scores checked.

    Parameters
    ----------
    graph : DependencyGraph
    scores : mapping of str to Tensor
        One score per unit of each prunable group; the lowest go first.
    ratio : float
        Share of the units of all chosen groups that is removed, in (0, 1).
    target : mapping
        Instead of a ratio: ``{"macs": share kept}``, ``{"params": share kept}`` or
        ``{"latency": share kept}``.
    scope : str
        ``"global"`` ranks all units together; ``"uniform"`` removes the same share of every group;
        ``"isomorphic"`` ranks within groups of the same kind and size (Fang et al., ECCV 2024).
    kinds : iterable of str, optional
        Kinds of groups to prune; all by default. ``"auto"``: whole heads, and what flows through
        the residual stream, only where the target cannot be reached without.
    ignore : sequence of str
        Patterns (``*``, ``?``) of module, parameter or group names; a group with a member that
        matches is left whole.
    round_to : int or "auto"
    min_units : int
        See `Limits`.
    normalise : str
        What each group's scores are divided by first: ``"mean"`` (default), ``"max"``, ``"sum"``,
        ``"none"``. By the mean, a group of few heavy units and one of many light ones meet at the
        same level, and a group whose scores are spread widely gives up more of its units.
    floor : float
        No group keeps less than this part of the share that all keep together; not with `per`.
        Groups may lose all of their units with ``min_units=0, floor=0``.
    per : str
        ``"unit"`` ranks by score; ``"macs"``, ``"params"`` and ``"latency"`` by score per cost
        saved, for scores that can be added up over groups (scope global).
    latency : LatencyModel, optional
        Of the graph (`pruners.measured_latency`): for a target or a ranking by latency, and for
        ``round_to="auto"``.

    Returns
    -------
    callable
        Takes scores of every unit by group name (higher is more important), and gives the units
        kept, ascending, of every chosen group. It raises when a target cannot be reached.

    Raises
    ------
    DepgraphError
        For arguments out of range, and nothing left to prune.

    Notes
    -----
    By ratio, ``round(ratio * units)`` units go. With `round_to`, units go in blocks and the number
    removed is within half a block of that; where `min_units` stops a group, others give more.
    A target is met by bisection over the ratio, or by descent (`choosing.descent`), with costs from
    the graph: no model is built. Where one large block decides whether the target is met, the most
    important of the smaller blocks come back until it is (`choosing.settling`).
    """
    check_choice("scope", scope, SCOPES)
    check_choice("normalise", normalise, NORMALISATIONS)
    check_choice("per", per, PER)
    limits = check_limits(min_units, round_to)
    if not 0 <= floor <= 1:
        raise DepgraphError(f"floor is {floor}; the share must lie between 0 and 1")
    if per != "unit" and scope != "global":
        raise DepgraphError(
            f"per '{per}' ranks all units together; use scope global, not '{scope}'"
        )
    if latency is None and (per == "latency" or round_to == AUTO or "latency" in (target or {})):
        raise DepgraphError(
            "what is fast has to be measured: pass latency=pruners.measured_latency(graph)"
        )
    goal = Goal(graph, ratio, target, latency)
    widened = [choose_groups(graph, chosen, ignore) for chosen in kind_choices(graph, kinds)]

    def keep(groups: list[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {g.name: normalised(g, scores, normalise) for g in groups}
        blocks = {g.name: block_sizes(graph, g, limits, latency) for g in groups}
        if ratio is not None and not any(map(len, blocks.values())):
            raise Unreachable(f"a ratio of {ratio:g}", 1.0)
        if per != "unit":
            kept = descend(groups, values, blocks, goal.costs(per), goal.missing(groups))
        else:
            rankings = [_rank(members, values, blocks) for members in _classes(groups, scope)]
            kept = goal.meet(partial(_keep, rankings, floor))
        kept = goal.settle(groups, values, blocks, kept)
        return kept if round_to != AUTO else _no_slower(graph, latency, groups, values, kept)

    def choose(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for groups in widened[:-1]:
            with suppress(Unreachable):
                return keep(groups, scores)
        return keep(widened[-1], scores)

    return choose


def _no_slower(
    graph: DependencyGraph,
    latency: LatencyModel | None,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    kept: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The allocation, with units put back where more are as fast beside what the others lost."""
    assert latency is not None  # checked by the allocator
    sizes = {name: len(units) for name, units in kept.items()}
    for group in groups:
        sizes[group.name] = latency.no_slower(group, sizes, graph.multiple_of(group.name))
    orders = {g.name: torch.argsort(scores[g.name], stable=True) for g in groups}
    return {name: order[len(order) - sizes[name] :].sort().values for name, order in orders.items()}


def allocate(
    graph: DependencyGraph, scores: Mapping[str, Tensor], **choices: Any
) -> dict[str, Tensor]:
    """Choose the units that stay.

    Parameters
    ----------
    graph : DependencyGraph
    scores : mapping of str to Tensor
        One per unit, by group name; higher is more important.
    **choices
        See `allocator`.

    Returns
    -------
    dict of str to LongTensor
        Units kept, ascending, of every chosen group.

    Raises
    ------
    DepgraphError
        For arguments out of range, nothing left to prune, and a target that cannot be reached.
    """
    return allocator(graph, **choices)(scores)


def _classes(groups: Sequence[Group], scope: str) -> list[list[Group]]:
    """Groups that are ranked together."""
    classes: dict[object, list[Group]] = {}
    for group in groups:
        key = {"global": None, "uniform": group.name}.get(scope, (group.kind, group.size))
        classes.setdefault(key, []).append(group)
    return list(classes.values())


@dataclass(frozen=True)
class _Ranking:
    """Blocks of units of several groups in the order in which they would be removed.

    Attributes
    ----------
    orders : list of LongTensor
        Units of each group, least important first.
    owner, size, depth : Tensor
        Of each block: its group, its number of units, and the share of the group that is gone
        once it is removed.
    """

    groups: Sequence[Group]
    orders: list[Tensor]
    owner: Tensor
    size: Tensor
    depth: Tensor

    def keep(self, share: float, floor: float) -> dict[str, Tensor]:
        """Units kept when the first blocks, as near to the share as may be, are removed."""
        budget = round(share * sum(group.size for group in self.groups))
        allowed = self.depth <= 1 - (1 - share) * floor + 1e-9
        owner, size = self.owner[allowed], self.size[allowed]
        removed = torch.cat([torch.zeros(1, dtype=torch.long), size.cumsum(0)])
        count = int((removed - budget).abs().argmin())
        gone = torch.bincount(
            owner[:count], weights=size[:count].double(), minlength=len(self.groups)
        )
        return {
            group.name: order[int(first) :].sort().values
            for group, order, first in zip(self.groups, self.orders, gone, strict=True)
        }


def _rank(
    groups: Sequence[Group], scores: Mapping[str, Tensor], blocks: Mapping[str, Tensor]
) -> _Ranking:
    orders, owners, sizes, depths, costs = [], [], [], [], []
    for i, group in enumerate(groups):
        order = torch.argsort(scores[group.name], stable=True)
        size = blocks[group.name]
        ends = size.cumsum(0)
        running = torch.cat([torch.zeros(1), scores[group.name][order].cumsum(0)])
        orders.append(order)
        owners.append(torch.full_like(size, i))
        sizes.append(size)
        depths.append(ends / group.size)
        costs.append((running[ends] - running[ends - size]) / size)
    rank = torch.argsort(torch.cat(costs), stable=True)
    return _Ranking(
        groups, orders, torch.cat(owners)[rank], torch.cat(sizes)[rank], torch.cat(depths)[rank]
    )


def _keep(rankings: Sequence[_Ranking], floor: float, share: float) -> dict[str, Tensor]:
    return {n: units for ranking in rankings for n, units in ranking.keep(share, floor).items()}
