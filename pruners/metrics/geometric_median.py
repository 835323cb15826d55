"""FPGM: units that the others can stand in for, by their distances; reads the weights only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, Group
from pruners.registry import Batch

BLOCK = 1024
"""Units whose distances to all others are held at once."""


class FPGM:
    """Sum of a unit's distances to all units of its group; small near the geometric median.

    ``sum over v of |w_u - w_v|``, where ``w_u`` is all that the unit's members hold, one after the
    other: what writes it, its biases, and what reads it. A unit near the geometric median is one
    that the others can represent, however large it is.

    Notes
    -----
    ``O(n^2 p)`` for n units that hold p numbers each.

    References
    ----------
    He, Liu, Wang, Hu, Yang: "Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration", CVPR 2019, section 3.3, over a group in place of a layer's filters.
    """

    name = "fpgm"
    needs_data = False

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One sum of distances per unit."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return {group.name: _distances(parameters, group) for group in graph.prunable}


def _distances(parameters: dict[str, Tensor], group: Group) -> Tensor:
    """Sum of the Euclidean distances from each unit to all others, (group.size,)."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for start in range(0, group.size, BLOCK):
        units = slice(start, start + BLOCK)
        squares = torch.zeros(len(total[units]), group.size, dtype=torch.float64)
        for rows in _rows(parameters, group):
            rows = rows - rows.mean(0)  # differences stay, and cancel less in what follows
            norms = rows.square().sum(1).double()
            products = (rows[units] @ rows.T).double()
            squares += (norms[units, None] + norms - 2 * products).cpu()
        squares[torch.arange(len(squares)), torch.arange(start, start + len(squares))] = 0
        total[units] = squares.clamp_min(0).sqrt().sum(1)
    return total


def _rows(parameters: dict[str, Tensor], group: Group) -> Iterator[Tensor]:
    """What each member holds of each unit: (group.size, numbers), in float32."""
    for member in group.members:
        weight = parameters[member.parameter].float().movedim(member.dim, 0)
        yield weight[member.positions.to(weight.device)].flatten(1)
