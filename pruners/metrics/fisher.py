"""Metrics of second order from gradients of single samples: Fisher and Gauss-Newton diagonals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depgraph import DependencyGraph
from pruners.registry import Batch
from pruners.statistics.calls import first_tensor, run
from pruners.statistics.finite import check_outputs
from pruners.statistics.gradient import Loss, check_targets, cross_entropy, evaluating
from pruners.statistics.per_sample import gate_gradients, squared_gradients
from pruners.statistics.units import reduce_others, sum_over_members


def _half_curvature(
    model: nn.Module, graph: DependencyGraph, curvature: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``sum over members of 0.5 * h * w^2``."""
    weights = dict(model.named_parameters())

    def reduction(name: str, dim: int) -> Tensor:
        return reduce_others(weights[name].detach().float() ** 2 * curvature[name], dim) / 2

    return sum_over_members(graph, reduction)


class Hessian:
    """Rise of the loss when a unit is switched off, by a diagonal second-order expansion.

    ``sum over members of 0.5 * h * w^2``, with the diagonal ``h`` of the empirical Fisher matrix,
    the mean over samples of squared per-sample gradients, in place of the Hessian's.

    References
    ----------
    LeCun, Denker, Solla: "Optimal Brain Damage", NeurIPS 1989, eq. 5.
    Riaz, Smeaton: grouped structural global pruning of vision transformers for domain
    generalisation, 2025.
    """

    name = "hessian"
    needs_data = True

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss or cross_entropy

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One second-order estimate of the change of the loss per unit."""
        check_targets(graph, batches, self.loss)
        squares = squared_gradients(model, graph, batches, self.loss, self.name)
        return _half_curvature(model, graph, squares)


class GaussNewton:
    """Diagonal second-order expansion with the Gauss-Newton matrix in place of the Hessian.

    ``sum over members of 0.5 * h * w^2``, with ``h`` the diagonal of ``J^T H_out J`` of the cross
    entropy: the mean of squared gradients whose labels are drawn from what the model predicts. The
    targets are not read; unlike the empirical Fisher's, it does not vanish where the model fits.

    Parameters
    ----------
    draws : int
        Labels drawn for each sample.
    seed : int
        Of the labels.

    References
    ----------
    Schraudolph: "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Neural
    Computation 2002. Martens: "New Insights and Perspectives on the Natural Gradient Method", JMLR
    2020, section 9 (equal to the Fisher matrix, so that drawn labels estimate it without bias).
    """

    name = "gauss_newton"
    needs_data = True

    def __init__(self, draws: int = 1, seed: int = 0) -> None:
        self.draws = draws
        self.seed = seed

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One second-order estimate of the change of the loss per unit."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [
            (inputs, labels)
            for inputs, _ in batches
            for labels in draw_labels(model, inputs, self.draws, generator)
        ]
        squares = squared_gradients(model, graph, drawn, _summed_cross_entropy, self.name)
        return _half_curvature(model, graph, squares)


@torch.no_grad()
def draw_labels(
    model: nn.Module, inputs: object, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Labels from what the model predicts, each shaped like its logits without the last dim."""
    with evaluating(model):
        logits = first_tensor(run(model, inputs))
    shares = logits.flatten(0, -2).float().softmax(-1).cpu()
    check_outputs(shares)
    labels = torch.multinomial(shares, draws, replacement=True, generator=generator)
    return [column.reshape(logits.shape[:-1]).to(logits.device) for column in labels.T]


def _summed_cross_entropy(output: object, labels: Tensor) -> Tensor:
    """Of one sample: summed over its places, where it has several."""
    logits = first_tensor(output).flatten(0, -2).float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


class Fisher:
    """Mean squared gradient of a gate that multiplies all parameters of a unit, halved.

    ``1/2N sum over samples of (sum over members of w * dL_n/dw)^2``: the second-order expansion in
    the gate with the empirical Fisher matrix, taken for a unit as a whole, its members' products
    included (`Hessian` leaves these out). A rise of the loss, so ranked by what a unit saves.

    References
    ----------
    Theis, Korshunova, Tejani, Huszar: "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, section 2.1. Liu, Zhang, Kuang, et al.: "Group Fisher Pruning for Practical
    Network Compression", ICML 2021, section 3 (gradients of coupled layers are added, then
    squared; importance by what is saved).
    """

    name = "fisher"
    needs_data = True
    additive = True

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss or cross_entropy

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One second-order estimate of the change of the loss per unit."""
        check_targets(graph, batches, self.loss)
        _, squares = _gate_moments(model, graph, batches, self.loss, self.name)
        return {name: square / 2 for name, square in squares.items()}


class Taylor2:
    """Absolute change of the loss when a unit goes, by first and second order in its gate.

    ``|-g + h/2|``, ``g`` the mean gradient of a gate that multiplies all parameters of the unit,
    ``h`` its curvature by the empirical Fisher matrix: the mean of the squared gradients of single
    samples (`Hutchinson` takes the Hessian itself).

    References
    ----------
    Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning",
    CVPR 2019, section 3.1, the second-order expansion, with a gate for a unit.
    """

    name = "taylor2"
    needs_data = True

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss or cross_entropy

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One second-order estimate of the change of the loss per unit."""
        check_targets(graph, batches, self.loss)
        means, squares = _gate_moments(model, graph, batches, self.loss, self.name)
        return {name: (squares[name] / 2 - mean).abs() for name, mean in means.items()}


def _gate_moments(
    model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch], loss: Loss, name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean, and mean square, over samples of the gradient of each unit's gate."""
    sums = {g.name: torch.zeros(2, g.size, dtype=torch.float64) for g in graph.prunable}
    for gradients in gate_gradients(model, graph, batches, loss, name):
        for group, gradient in gradients.items():
            sums[group] += torch.stack([gradient.sum(0), gradient.square().sum(0)])
    count = sum(len(targets) for _, targets in batches)
    return (
        {group: total[0] / count for group, total in sums.items()},
        {group: total[1] / count for group, total in sums.items()},
    )
