"""Metrics that read the weights only: random (the control), L1, L2 and LAMP."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from pruners.registry import Batch
from pruners.statistics.units import sum_over_members


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


class Norm:
    """A norm of all that a unit's members hold; what L1 and L2 share.

    Attributes
    ----------
    order : float
        The power that is summed.
    """

    order: float

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """The norm per unit."""
        parameters = dict(model.named_parameters())
        return self.from_sums(graph, lambda name: power_sums(parameters[name].detach(), self.order))

    def from_sums(
        self, graph: DependencyGraph, sums: Callable[[str], list[Tensor]]
    ) -> dict[str, Tensor]:
        """Scores from what `power_sums` gives for each parameter, wherever the weights are.

        Parameters
        ----------
        graph : DependencyGraph
        sums : callable
            Parameter name -> its `power_sums`; called once for each.

        Returns
        -------
        dict of str to Tensor (group.size,)
        """
        known = cache(sums)
        totals = sum_over_members(graph, lambda name, dim: known(name)[dim])
        return {name: total ** (1 / self.order) for name, total in totals.items()}


def power_sums(weight: Tensor, order: float) -> list[Tensor]:
    """``sum |w|^order`` over all dimensions but one, for each dimension in turn.

    Parameters
    ----------
    weight : Tensor
        Of any shape; read once, in pieces, so that no copy of it is made.
    order : float

    Returns
    -------
    list of Tensor, float32
        One of shape ``(weight.shape[dim],)`` for each dimension.
    """
    return add_powers([weight], order)


def add_powers(pieces: Iterable[Tensor], order: float) -> list[Tensor]:
    """The `power_sums` of a tensor that comes in pieces along its first dimension.

    Parameters
    ----------
    pieces : iterable of Tensor
        At least one.
    order : float

    Returns
    -------
    list of Tensor, float32
    """
    rows: list[Tensor] = []
    rest = torch.zeros(())
    for piece in itertools.chain.from_iterable(map(_pieces, pieces)):
        powers = piece.float().abs() ** order
        rows.append(powers.flatten(1).sum(1) if powers.dim() > 1 else powers)
        rest = rest.to(powers.device) + powers.sum(0)
    dims = range(rest.dim())
    others = [[other for other in dims if other != dim] for dim in dims]
    return [torch.cat(rows), *(rest.sum(o) if o else rest for o in others)]


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, _PIECE * len(weight) // max(1, weight.numel())))


_PIECE = 1 << 18
"""Numbers that fit into a core's cache together."""


class L1(Norm):
    """Sum of absolute values over all members of a unit (Li et al. 2017).

    References
    ----------
    Li, Kadav, Durdanovic, Samet, Graf: "Pruning Filters for Efficient ConvNets", ICLR 2017.
    """

    name = "l1"
    needs_data = False
    order = 1.0


class L2(Norm):
    """Euclidean norm over all members of a unit, as one group (Fang et al. 2023, eq. 4).

    References
    ----------
    Fang, Ma, Song, Mi, Wang: "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """

    name = "l2"
    needs_data = False
    order = 2.0


class Lamp(L2):
    """Share of a unit's squared norm in that of all units at least as large (Lee et al. 2021).

    ``|w_u|^2 / sum over v with |w_v| >= |w_u| of |w_v|^2``, the norms taken over all members. The
    order within a group is that of L2; the scores of groups are made to be compared as they are,
    so they are not normalised: the largest unit of each has the score 1.

    References
    ----------
    Lee, Park, Mo, Ahn, Shin: "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021,
    the LAMP score, with the units of a group in place of the weights of a layer.
    """

    name = "lamp"
    normalise = "none"

    def from_sums(
        self, graph: DependencyGraph, sums: Callable[[str], list[Tensor]]
    ) -> dict[str, Tensor]:
        """Scores from `power_sums`, as `Norm.from_sums`."""
        norms = super().from_sums(graph, sums)
        return {name: _share_of_larger(norm**2) for name, norm in norms.items()}


def _share_of_larger(squares: Tensor) -> Tensor:
    order = squares.argsort(stable=True)
    larger = squares[order].flip(0).cumsum(0).flip(0)  # ties in the order of their index
    shares = torch.empty_like(squares)
    shares[order] = squares[order] / larger.clamp_min(1e-300)
    return shares
