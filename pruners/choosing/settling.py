"""Puts blocks back into an allocation that removed more than was asked for, to meet the target.

A block of the residual stream can be a tenth of a model's cost. Where such a one had to go, smaller
blocks that went before it need not have gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from depgraph import Group

TOLERANCE = 0.005
"""How near to the target is near enough, as a part of it."""


def put_back(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    blocks: Mapping[str, Tensor],
    kept: dict[str, Tensor],
    cost: Callable[[Mapping[str, int]], float],
    share: float,
) -> dict[str, Tensor]:
    """Put back the most important blocks that fit under a target.

    Parameters
    ----------
    groups : sequence of Group
    scores : mapping of str to Tensor
    blocks : mapping of str to LongTensor
        Sizes of the blocks in which the units of a group went, one after the other.
    kept : dict of str to LongTensor
        Units kept.
    cost : callable
        Share of the dense model's cost, by the units left of each group.
    share : float
        The target.

    Returns
    -------
    dict of str to LongTensor
        The same where its cost is within `TOLERANCE` of the target, or above it; at most that much
        above it otherwise.
    """
    sizes = {name: len(units) for name, units in kept.items()}
    if cost(sizes) >= share * (1 - TOLERANCE):
        return kept
    orders = {g.name: torch.argsort(scores[g.name], stable=True) for g in groups}
    gone = {g.name: _gone(blocks[g.name].tolist(), g.size - sizes[g.name]) for g in groups}
    for limit in (share, share * (1 + TOLERANCE)):  # beyond it only where it is not met else
        while cost(sizes) < share * (1 - TOLERANCE):
            fitting = _next_back(groups, scores, orders, gone, sizes, cost, limit)
            if fitting is None:
                break
            sizes = {**sizes, fitting: sizes[fitting] + gone[fitting].pop()}
    return {name: order[len(order) - sizes[name] :].sort().values for name, order in orders.items()}


def _next_back(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    gone: Mapping[str, list[int]],
    sizes: Mapping[str, int],
    cost: Callable[[Mapping[str, int]], float],
    limit: float,
) -> str | None:
    """The group with the most important block that can be put back within a limit, if any."""
    choices = []
    for group in groups:
        name = group.name
        if gone[name]:
            last = group.size - sizes[name]  # units gone, the most important ones last
            back = orders[name][last - gone[name][-1] : last]
            choices.append((float(scores[name][back].mean()), name))
    for _, name in sorted(choices, reverse=True):
        if cost({**sizes, name: sizes[name] + gone[name][-1]}) <= limit:
            return name
    return None


def _gone(blocks: Sequence[int], units: int) -> list[int]:
    """The blocks that make up the units that are gone."""
    found: list[int] = []
    for size in blocks:
        if sum(found) >= units:
            break
        found.append(size)
    return found
