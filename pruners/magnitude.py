"""Metrics that read the weights only: random (the control), L1 and L2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from pruners._units import sum_over_members
from pruners.metrics import Batch, register


@register
class Random:
    """Uniform numbers; what any other metric has to beat.

    Parameters
    ----------
    seed : int
        The same seed gives the same scores.
    """

    name = "random"
    needs_data = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One number in [0, 1) per unit; the global random state is not touched."""
        generator = torch.Generator().manual_seed(self.seed)
        return {g.name: torch.rand(g.size, generator=generator) for g in graph.prunable}


class _Norm:
    order: float

    def _powers(self, model: nn.Module, graph: DependencyGraph) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())

        def reduction(name: str, dim: int) -> Tensor:
            weight = parameters[name].detach()
            others = [other for other in range(weight.dim()) if other != dim]
            if not others:
                return weight.float().abs() ** self.order
            # No copy of the weight is made: the norm reads it once.
            norm = torch.linalg.vector_norm(weight, self.order, dim=others, dtype=torch.float32)
            return norm**self.order

        return sum_over_members(graph, reduction)


@register
class L1(_Norm):
    """Sum of absolute values over all members of a unit (Li et al. 2017).

    References
    ----------
    Li, Kadav, Durdanovic, Samet, Graf: "Pruning Filters for Efficient ConvNets", ICLR 2017.
    """

    name = "l1"
    needs_data = False
    order = 1.0

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """``sum |w|`` per unit."""
        return self._powers(model, graph)


@register
class L2(_Norm):
    """Euclidean norm over all members of a unit, as one group (Fang et al. 2023, eq. 4).

    References
    ----------
    Fang, Ma, Song, Mi, Wang: "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """

    name = "l2"
    needs_data = False
    order = 2.0

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """``sqrt(sum w^2)`` per unit."""
        return {name: total.sqrt() for name, total in self._powers(model, graph).items()}
