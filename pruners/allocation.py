"""From scores to the units that stay, under a ratio or a budget."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from depgraph import DependencyGraph, DepgraphError, Group

SCOPES = ("global", "uniform", "isomorphic")
NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores / scores.mean().clamp_min(1e-30),
    "max": lambda scores: scores / scores.max().clamp_min(1e-30),
    "sum": lambda scores: scores / scores.sum().clamp_min(1e-30),
    "median": lambda scores: scores / scores.median().clamp_min(1e-30),
    "spread": lambda scores: (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-30),
    "rank": lambda scores: scores.argsort(stable=True).argsort(stable=True) / len(scores),
    "none": lambda scores: scores,
}
"""What scores of one group are divided by before groups are ranked together."""


@dataclass(frozen=True)
class Limits:
    """What an allocation has to respect.

    Attributes
    ----------
    min_units : int
        Units that stay in every group at least.
    round_to : int
        Kept counts are multiples of this; a group smaller than it stays whole.
    """

    min_units: int = 1
    round_to: int = 1


def allocate(
    graph: DependencyGraph,
    scores: Mapping[str, Tensor],
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    scope: str = "global",
    kinds: Iterable[str] | None = None,
    ignore: Sequence[str] = (),
    round_to: int = 1,
    min_units: int = 1,
    normalise: str = "mean",
    floor: float = 0.5,
) -> dict[str, Tensor]:
    """Choose the units that stay.

    Parameters
    ----------
    graph : DependencyGraph
    scores : mapping of str to Tensor
        One score per unit of each prunable group; the lowest go first.
    ratio : float
        Share of the units of all chosen groups that is removed, in (0, 1).
    target : mapping
        Instead of a ratio: ``{"macs": share kept}`` or ``{"params": share kept}``.
    scope : str
        ``"global"`` ranks all units together; ``"uniform"`` removes the same share of every group;
        ``"isomorphic"`` ranks within groups of the same kind and size (Fang et al., ECCV 2024).
    kinds : iterable of str, optional
        Kinds of groups to prune; all by default.
    ignore : sequence of str
        Patterns (``*``, ``?``) of module, parameter or group names; a group with a member that
        matches is left whole.
    round_to, min_units : int
        See `Limits`.
    normalise : str
        What each group's scores are divided by first: ``"mean"`` (default), ``"max"``, ``"sum"``,
        ``"none"``. By the mean, a group of few heavy units and one of many light ones meet at the
        same level, and a group whose scores are spread widely gives up more of its units.

    Returns
    -------
    dict of str to LongTensor
        Units kept, ascending, of every chosen group.

    Raises
    ------
    DepgraphError
        For arguments out of range, nothing left to prune, and a target that cannot be reached.

    Notes
    -----
    By ratio, ``round(ratio * units)`` units go. With `round_to`, units go in blocks and the number
    removed is within half a block of that; where `min_units` stops a group, others give more.
    A target is met by bisection over the ratio, with costs from the graph: no model is built.
    """
    check_choice("scope", scope, SCOPES)
    check_choice("normalise", normalise, NORMALISATIONS)
    limits = check_limits(min_units, round_to)
    if not 0 <= floor <= 1:
        raise DepgraphError(f"floor is {floor}; the share must lie between 0 and 1")
    groups = choose_groups(graph, kinds, ignore)
    normalised = {g.name: _normalised(g, scores, normalise) for g in groups}
    rankings = [_rank(members, normalised, limits) for members in _classes(groups, scope)]

    def at(share: float) -> dict[str, Tensor]:
        return {n: units for r in rankings for n, units in r.keep(share, floor).items()}

    if (ratio is None) == (target is None):
        raise DepgraphError("give either a ratio or a target, and not both")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise DepgraphError(f"ratio is {ratio}; the share removed must lie between 0 and 1")
        return at(ratio)
    assert target is not None
    return _meet(graph, at, target)


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices, with the nearest one as a hint."""
    options = list(choices)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DepgraphError(f"unknown {what} '{value}'; {hint}choose one of {', '.join(options)}")


def check_limits(min_units: int, round_to: int) -> Limits:
    """The two limits, refused when below one."""
    for name, value in (("min_units", min_units), ("round_to", round_to)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DepgraphError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return Limits(min_units, round_to)


def choose_groups(
    graph: DependencyGraph, kinds: Iterable[str] | None, ignore: Sequence[str]
) -> list[Group]:
    """Prunable groups of the given kinds without a member that is to be ignored.

    Raises
    ------
    DepgraphError
        For a kind the model does not have, a pattern that matches nothing, or nothing left.
    """
    present = list(dict.fromkeys(group.kind for group in graph.prunable))
    wanted = present if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in wanted:
        check_choice("kind", kind, present)
    groups = [group for group in graph.prunable if group.kind in wanted]
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not any(_matches(group, pattern) for group in graph.groups):
            raise DepgraphError(f"ignore pattern '{pattern}' matches no module, parameter or group")
        groups = [group for group in groups if not _matches(group, pattern)]
    if not groups:
        raise DepgraphError("nothing is left to prune; ignore less, choose more kinds")
    return groups


def _matches(group: Group, pattern: str) -> bool:
    if fnmatchcase(group.name, pattern):
        return True
    for member in (*group.members, *group.buffers):
        parts = member.parameter.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        if any(fnmatchcase(prefix, pattern) for prefix in prefixes):
            return True
    return False


def _normalised(group: Group, scores: Mapping[str, Tensor], how: str) -> Tensor:
    if group.name not in scores:
        raise DepgraphError(f"the metric gave no scores for group '{group.name}'")
    values = torch.as_tensor(scores[group.name]).detach().to("cpu", torch.float64)
    if values.shape != (group.size,):
        raise DepgraphError(
            f"the metric gave scores of shape {tuple(values.shape)} for group '{group.name}' of "
            f"{group.size} units"
        )
    if not torch.isfinite(values).all():
        raise DepgraphError(f"scores of group '{group.name}' are not finite; check the weights")
    return NORMALISATIONS[how](values)


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


def _rank(groups: Sequence[Group], scores: Mapping[str, Tensor], limits: Limits) -> _Ranking:
    orders, owners, sizes, depths, costs = [], [], [], [], []
    for i, group in enumerate(groups):
        order = torch.argsort(scores[group.name], stable=True)
        size = _block_sizes(group.size, limits)
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


def _block_sizes(size: int, limits: Limits) -> Tensor:
    """Sizes of the blocks that may go, one after the other, from a group of this size."""
    step = limits.round_to
    least = -(-limits.min_units // step) * step
    if size <= least:
        return torch.zeros(0, dtype=torch.long)
    first = size % step or step
    return torch.tensor([first] + [step] * ((size - first - least) // step))


def _meet(
    graph: DependencyGraph,
    at: Callable[[float], dict[str, Tensor]],
    target: Mapping[str, float],
) -> dict[str, Tensor]:
    """The allocation whose cost is nearest to a share of the dense model's."""
    if len(target) != 1 or next(iter(target)) not in ("params", "macs"):
        raise DepgraphError(
            f"target is {dict(target)}; give one of {{'params': share}} and {{'macs': share}}"
        )
    ((what, share),) = target.items()
    if not 0 < share < 1:
        raise DepgraphError(f"target {what} is {share}; the share kept must lie between 0 and 1")
    dense = graph.num_params if what == "params" else graph.macs

    def cost(kept: Mapping[str, Tensor]) -> float:
        params, macs = graph.cost({name: len(units) for name, units in kept.items()})
        return (params if what == "params" else macs) / dense

    least = cost(at(1.0))
    if share < least:
        raise DepgraphError(
            f"target {what} {share} cannot be reached: with these groups and limits at least "
            f"{least:.4f} stays; prune more kinds, ignore less"
        )
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) > share else (low, middle)
    return min((at(low), at(high)), key=lambda kept: abs(cost(kept) - share))
