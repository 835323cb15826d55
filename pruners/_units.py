"""From numbers per parameter element to one number per unit of each group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from depgraph import DependencyGraph

Reduction = Callable[[str, int], Tensor]
"""Parameter name and dimension -> the sum of element scores over all other dimensions."""


def sum_over_members(graph: DependencyGraph, reduction: Reduction) -> dict[str, Tensor]:
    """Add up, for each unit of each prunable group, what its members hold.

    Parameters
    ----------
    graph : DependencyGraph
    reduction : callable
        Called once for each parameter dimension, however many groups share it.

    Returns
    -------
    dict of str to Tensor (group.size,)
        In float64 on the CPU.
    """
    reduced: dict[tuple[str, int], Tensor] = {}
    scores = {}
    for group in graph.prunable:
        total = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            key = (member.parameter, member.dim)
            if key not in reduced:
                reduced[key] = reduction(*key).detach().to("cpu", torch.float64)
            total += reduced[key][member.positions].sum(dim=1)
        scores[group.name] = total
    return scores


def reduce_others(values: Tensor, dim: int) -> Tensor:
    """Sum over every dimension but one."""
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(dim=others) if others else values
