"""Optimal Brain Surgeon for whole units: the rise of the loss when one goes and the rest adapts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, Group
from pruners.registry import Batch
from pruners.statistics.attention import Attention, find_attentions
from pruners.statistics.moments import Moments, layer_moments
from pruners.statistics.solving import damped_factor

DAMPING = 0.01
"""Share of the mean diagonal that is added to the inputs' second moment."""

POOL = 32
"""Columns among which the next units are looked for before all others are brought up to date."""


class OBS:
    """Rise of the loss per unit, the layers that read it refitted, in the order of elimination.

    For each layer that reads a group, with ``H`` the second moment of its inputs and ``G`` that of
    the gradient at its outputs, removing the columns ``u`` costs ``1/2 tr(W_u^T G W_u
    [H^-1]_uu^-1)`` when the other columns take over what they can. The cheapest unit goes, the
    weights and ``H^-1`` are updated, and so on to the last one: each unit's score is what it cost
    when it went. Scores are in units of the loss, and so comparable between groups.

    Parameters
    ----------
    damping : float
        Share of the mean diagonal of ``H`` that is added to it.

    Notes
    -----
    Query and key dims are read by each other: there the gate on a dim of the query counts,
    ``1/2 sum_t (q_t g_t)^2``. A group that no linear layer or convolution reads is scored by the
    outputs of the layers that write it, in the same way. ``O(n^3)`` for a layer of n inputs.

    References
    ----------
    Hassibi and Stork: "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS
    1992. Kurtic et al.: "ZipLM: Inference-Aware Structured Pruning of Language Models", NeurIPS
    2023 (units as blocks of columns). Ling et al.: "SlimGPT", NeurIPS 2024.
    """

    name = "obs"
    needs_data = True
    additive = True
    num_samples = 256
    of_tokens = False

    def __init__(self, damping: float = DAMPING) -> None:
        self.damping = damping

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One rise of the loss per unit."""
        names = {m.parameter for g in graph.prunable for m in g.members}
        parameters = dict(model.named_parameters())
        moments = layer_moments(model, names, batches, of_tokens=self.of_tokens)
        queries = {a.query_group.name: a for a in find_attentions(graph)}
        scores = {}
        for group in graph.prunable:
            score = self._readers(group, parameters, moments)
            if group.name in queries:
                costs = gate_scores(queries[group.name], parameters, moments)
                # of pairs of a head and a dim, or of dims that all heads share
                score = score + (costs.flatten() if len(score) > costs.shape[1] else costs.sum(0))
            elif not score.any():
                score = self._writers(group, parameters, moments)
            scores[group.name] = score
        return scores

    def _readers(
        self, group: Group, parameters: dict[str, nn.Parameter], moments: dict[str, Moments]
    ) -> Tensor:
        """Sum over the layers that read the group; zeros when there is none."""
        total = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            weight = parameters[member.parameter]
            if member.dim != 1 or member.parameter not in moments or weight.dim() > 4:
                continue
            columns = _columns(member.positions, weight)
            if int(columns.max()) < len(moments[member.parameter].inputs) - 1:
                total += eliminate(
                    weight.detach().flatten(1), moments[member.parameter], columns, self.damping
                ).cpu()
        return total

    def _writers(
        self, group: Group, parameters: dict[str, nn.Parameter], moments: dict[str, Moments]
    ) -> Tensor:
        """``1/2 sum_t (y_t g_t)^2`` over the outputs of the layers that write the group."""
        total = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            if member.dim == 0 and member.parameter in moments:
                costs = gate_costs(parameters[member.parameter], moments[member.parameter])
                if len(costs) > int(member.positions.max()):
                    total += costs[member.positions].sum(1).cpu()
        return total


class OBSFeatures(OBS):
    """The same of the tokens before the head: what they change by, in place of the loss.

    The squared distance of all tokens (of a convolutional net, its last feature map) to those of
    the model itself, relative to their size. Classes have no part in it: what the head of the
    fine-tuned model does not read may be what another domain needs. No label is read.

    References
    ----------
    As `OBS`; features in place of labels as in SnapViT, arXiv 2510.17700, 2025.
    """

    name = "obs_features"
    of_tokens = True


def _columns(positions: Tensor, weight: Tensor) -> Tensor:
    """Positions along dimension 1 as columns of the weight flattened to two dimensions."""
    inner = weight[0, 0].numel()
    return (positions[:, :, None] * inner + torch.arange(inner)).flatten(1)


def gate_costs(weight: Tensor, moments: Moments) -> Tensor:
    """Half the expected square of output times gradient, for each output of a layer."""
    rows = weight.detach().flatten(1).double()
    inputs = moments.inputs[:-1, :-1]
    return 0.5 * ((rows @ inputs) * rows).sum(1) * moments.spread


def gate_scores(
    attention: Attention, parameters: dict[str, nn.Parameter], moments: dict[str, Moments]
) -> Tensor:
    """What the dims of the query cost (heads, head_dim); zeros when they were not seen."""
    name, index = attention.query.weight, attention.query.index
    if name not in moments:
        return torch.zeros(index.shape, dtype=torch.float64)
    return gate_costs(parameters[name], moments[name])[index].cpu()


def eliminate(weight: Tensor, moments: Moments, columns: Tensor, damping: float) -> Tensor:
    """What each unit costs at its turn when the cheapest goes first, again and again.

    Parameters
    ----------
    weight : Tensor (out, in)
    moments : Moments
    columns : LongTensor (units, k)
        Columns of each unit.
    damping : float

    Returns
    -------
    Tensor (units,)
        Rising in the order of elimination.

    Notes
    -----
    The next ones are looked for among the `POOL` cheapest, until the cheapest left of these costs
    more than as many others outside; then all are brought up to date at once, which is one product
    of matrices.
    """
    added = damping * moments.inputs.diagonal()[:-1].mean().clamp_min(1e-30)
    inverse = torch.cholesky_inverse(damped_factor(moments.inputs, added))
    columns = columns.to(inverse.device)
    weights = moments.weighted(weight) / 2**0.5
    weights = torch.nn.functional.pad(weights, (0, 1))  # the bias stays, and adapts
    scores = torch.zeros(len(columns), dtype=torch.float64, device=inverse.device)
    left = torch.arange(len(columns), device=inverse.device)
    reached = torch.zeros((), dtype=torch.float64, device=inverse.device)
    while len(left):
        costs = _costs(weights, inverse, columns[left])
        size = min(len(left), max(1, POOL // columns.shape[1]))
        order = costs.argsort(stable=True)
        bound = costs[order[min(2 * size, len(left) - 1)]]
        gone = _eliminate_pool(weights, inverse, columns, left[order[:size]], bound)
        for unit, cost in gone:
            reached = torch.maximum(reached, cost)
            scores[unit] = reached
        units = torch.tensor([unit for unit, _ in gone], device=left.device)
        out = columns[units].flatten()
        update = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weights.addmm_(weights[:, out], update, alpha=-1)
        inverse.addmm_(inverse[:, out], update, alpha=-1)
        left = left[~torch.isin(left, units)]
    return scores


def _costs(weights: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """``tr(W_u^T W_u [H^-1]_uu^-1)`` for each unit."""
    if columns.shape[1] == 1:
        at = columns[:, 0]
        return weights[:, at].square().sum(0) / inverse.diagonal()[at].clamp_min(1e-30)
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    own = weights[:, columns].permute(1, 0, 2)
    return (torch.linalg.solve(blocks, own.mT @ own)).diagonal(dim1=-2, dim2=-1).sum(-1)


def _eliminate_pool(
    weights: Tensor, inverse: Tensor, columns: Tensor, pool: Tensor, bound: Tensor
) -> list[tuple[int, Tensor]]:
    """Units of the pool in the order in which they go, with their costs; at least one."""
    held = columns[pool].flatten()
    weights, inverse = weights[:, held].clone(), inverse[held][:, held].clone()
    own = torch.arange(len(held), device=held.device).reshape(len(pool), -1)
    left = list(range(len(pool)))
    gone: list[tuple[int, Tensor]] = []
    while left:
        costs = _costs(weights, inverse, own[left])
        best = int(costs.argmin())
        if gone and costs[best] > bound:
            break
        unit = left.pop(best)
        gone.append((int(pool[unit]), costs[best]))
        out = own[unit]
        update = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weights -= weights[:, out] @ update
        inverse -= inverse[:, out] @ update
        inverse[out] = 0
        inverse[:, out] = 0
        inverse[out, out] = 1
    return gone
