"""Exact curvature of the loss in a gate on each unit, by products of the Hessian with signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from depgraph import DependencyGraph, Group
from pruners.registry import Batch
from pruners.statistics.gradient import (
    Loss,
    check_loss,
    check_targets,
    cross_entropy,
    evaluating,
    loss_of,
    scored,
)


class Hutchinson:
    """Half the second derivative of the loss by a gate that multiplies all parameters of a unit.

    ``1/2 E[v * (H v)]`` with signs ``v`` drawn at random and ``H`` the Hessian in the gates of all
    units, not an approximation of it: each draw is one backward pass through the gradient. The
    draws carry what other units' curvature adds to ``v * (H v)`` as noise, so many samples are
    worth more here than elsewhere. Negative curvature counts as none.

    Parameters
    ----------
    draws : int
        Sign vectors for each batch.
    seed : int
        Of the signs.
    loss : callable, optional

    References
    ----------
    Bekas, Kokiopoulou, Saad: "An estimator for the diagonal of a matrix", Applied Numerical
    Mathematics 2007. Yu, Yao, Gholami, et al.: "Hessian-Aware Pruning and Optimal Neural Implant",
    WACV 2022 (for structured pruning).
    """

    name = "hutchinson"
    needs_data = True

    def __init__(self, draws: int = 1, seed: int = 0, loss: Loss | None = None) -> None:
        self.draws = draws
        self.seed = seed
        self.loss = loss or cross_entropy

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One second-order estimate of the change of the loss per unit."""
        check_targets(graph, batches, self.loss)
        parameters, fixed = scored(model, graph)
        of = loss_of(model, fixed, self.loss)
        device = next(iter(parameters.values())).device
        sizes = {group.name: group.size for group in graph.prunable}
        gates = {n: torch.ones(k, device=device, requires_grad=True) for n, k in sizes.items()}
        generator = torch.Generator().manual_seed(self.seed)
        totals = {n: torch.zeros(k, dtype=torch.float64) for n, k in sizes.items()}
        count = sum(len(targets) for _, targets in batches) * self.draws
        # The fused kernels cannot be differentiated twice.
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for inputs, targets in batches:
                loss = of(_gated(parameters, graph.prunable, gates), inputs, targets)
                check_loss(loss, self.name)
                for name, estimate in self._draws(loss, gates, generator):
                    totals[name] += estimate * (len(targets) / count)
        return {name: (total / 2).clamp_min(0) for name, total in totals.items()}

    def _draws(
        self, loss: Tensor, gates: dict[str, Tensor], generator: torch.Generator
    ) -> list[tuple[str, Tensor]]:
        """``v * (H v)`` for each draw, by group."""
        leaves = list(gates.values())
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        found = []
        for draw in range(self.draws):
            signs = [torch.randint(2, gate.shape, generator=generator) * 2.0 - 1 for gate in leaves]
            signs = [sign.to(gate) for sign, gate in zip(signs, leaves, strict=True)]
            products = torch.autograd.grad(
                gradients, leaves, signs, retain_graph=draw + 1 < self.draws, allow_unused=True
            )
            for name, sign, product in zip(gates, signs, products, strict=True):
                if product is not None:
                    found.append((name, (sign * product).double().cpu()))
        return found


def _gated(
    parameters: dict[str, Tensor], groups: Sequence[Group], gates: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters, each unit's multiplied by its gate."""
    gated = dict(parameters)
    for group in groups:
        for member in group.members:
            weight = gated[member.parameter]
            positions = member.positions.to(weight.device)
            units = torch.full((weight.shape[member.dim],), group.size, device=weight.device)
            units[positions] = torch.arange(group.size, device=weight.device)[:, None]
            gate = gates[group.name]
            factors = torch.cat([gate, gate.new_ones(1)])[units].to(weight.dtype)
            shape = [-1 if dim == member.dim else 1 for dim in range(weight.dim())]
            gated[member.parameter] = weight * factors.view(shape)
    return gated
