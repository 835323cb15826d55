"""Each head's own choice of dims: how many stay is one number for all heads, which is not.

Scores of a shared dim add up what it is worth to all heads. Here each pair of a head and a dim is
scored as a unit of its own, by any metric that scores units by the members they have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError, Group, Member
from depgraph.coupling.axes import unit_positions
from pruners.registry import Batch, Metric


@dataclass(frozen=True)
class _Pairs(Member):
    """A member whose units are pairs of a leading unit and one of the group's own."""

    lead: Group

    @property
    def positions(self) -> Tensor:
        """LongTensor (leading units x own units, k)."""
        own = unit_positions(self._axis, self._atom)
        leading = unit_positions(self._axis, self.lead._atom)
        pair = torch.full((int(max(own.max(), leading.max())) + 1,), -1, dtype=torch.long)
        pair[own] = torch.arange(len(own))[:, None]
        lead = torch.zeros_like(pair)
        lead[leading] = torch.arange(len(leading))[:, None]
        places = own.flatten().sort().values
        order = torch.argsort(lead[places] * len(own) + pair[places], stable=True)
        return places[order].reshape(len(leading) * len(own), -1)


def own_choices(
    model: nn.Module,
    graph: DependencyGraph,
    metric: Metric,
    batches: Sequence[Batch],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The units that stay, of which each head keeps its own where it may.

    Parameters
    ----------
    model : nn.Module
    graph : DependencyGraph
    metric : Metric
    batches : sequence of (inputs, targets)
        For a metric that needs data.
    kept : mapping of str to LongTensor
        How many units of each group stay, and which where all heads keep the same.

    Returns
    -------
    dict of str to LongTensor (kept,) or (heads, kept)
        For `DependencyGraph.plan`.

    Raises
    ------
    DepgraphError
        When the metric does not score units by their members.
    """
    leads = {name: graph.lead(name) for name, units in kept.items() if len(units)}
    pairs = {name: _paired(graph.group(name), lead) for name, lead in leads.items() if lead}
    view = copy.copy(graph)
    vars(view)["prunable"] = tuple(pairs.values())
    scores = metric.score(model, view, batches)
    chosen: dict[str, Tensor] = dict(kept)
    for name, group in pairs.items():
        own = scores[name]
        if own.shape != (group.size,):
            raise DepgraphError(
                f"metric '{metric.name}' does not score single dims of a head; choose another, or "
                "let all heads keep the same"
            )
        rows = own.reshape(-1, graph.group(name).size)
        order = rows.argsort(dim=1, descending=True, stable=True)
        chosen[name] = order[:, : len(kept[name])].sort(dim=1).values
    return chosen


def _paired(group: Group, lead: Group) -> Group:
    members = tuple(
        _Pairs(m.parameter, m.dim, m.place, m._axis, m._atom, lead) for m in group.members
    )
    return replace(group, size=group.size * lead.size, members=members)
