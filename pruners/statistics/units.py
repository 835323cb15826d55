"""From numbers per parameter element to one number per unit of each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depgraph import DependencyGraph, Group
from depgraph.coupling.groups import Member

Reduction = Callable[[str, int], Tensor]
"""Parameter name and dimension -> the sum of element scores over all other dimensions.

One of shape (length of the dimension,), or (samples, length of the dimension)."""


def every_member(group: Group) -> Sequence[Member]:
    """All members of a group."""
    return group.members


def sum_over_members(
    graph: DependencyGraph,
    reduction: Reduction,
    members: Callable[[Group], Sequence[Member]] = every_member,
) -> dict[str, Tensor]:
    """Add up, for each unit of each prunable group, what its members hold.

    Parameters
    ----------
    graph : DependencyGraph
    reduction : callable
        Called once for each parameter dimension, however many groups share it.
    members : callable
        Which members of a group count.

    Returns
    -------
    dict of str to Tensor (group.size,) or (samples, group.size)
        In float64 on the CPU.
    """
    reduced: dict[tuple[str, int], Tensor] = {}
    scores = {}
    for group in graph.prunable:
        total = torch.zeros(group.size, dtype=torch.float64)
        for member in members(group):
            key = (member.parameter, member.dim)
            if key not in reduced:
                reduced[key] = reduction(*key).detach().to("cpu", torch.float64)
            total = total + reduced[key][..., member.positions].sum(dim=-1)
        scores[group.name] = total
    return scores


def reduce_others(values: Tensor, dim: int, keep: Sequence[int] = ()) -> Tensor:
    """Sum over every dimension but one, and those to keep."""
    others = [other for other in range(values.dim()) if other != dim and other not in keep]
    return values.sum(dim=others) if others else values
