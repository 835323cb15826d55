"""Norm scale: units by the factors that norms and layer scales multiply them with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from depgraph import DependencyGraph
from depgraph.coupling.propagate import arguments, op_name
from pruners.metrics.magnitude import L2
from pruners.registry import Batch
from pruners.statistics.units import reduce_others, sum_over_members

_NORMS = frozenset(
    (
        *("aten.batch_norm", "aten._native_batch_norm_legit", "aten.native_batch_norm"),
        *("aten.cudnn_batch_norm", "aten.instance_norm", "aten.group_norm"),
        *("aten.native_group_norm", "aten.layer_norm", "aten.native_layer_norm"),
        *("aten.rms_norm", "aten._fused_rms_norm"),
    )
)


class NormScale:
    """Sum of the absolute factors that norms and layer scales multiply a unit with.

    The factors are the weights of batch, layer, group and RMS norms, and every other parameter
    that is multiplied with an activation entry by entry (layer scale). Of a vision transformer
    that is the residual stream, ``embed``; **a group that no such factor touches (the hidden units
    of an MLP, heads without norms of their own) is scored by its L2 norm instead**, so choose
    ``kinds`` by what `scales_of` finds where that is not wanted. With the default normalisation by
    each group's mean the two kinds of scores can be ranked together.

    References
    ----------
    Liu, Li, Shen, Huang, Yan, Zhang: "Learning Efficient Convolutional Networks through Network
    Slimming", ICCV 2017, section 3 (the magnitude of gamma in eq. 2); summed where a group has
    several norms.
    """

    name = "norm_scale"
    needs_data = False

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """The sum of factors per unit; the L2 norm where there are none."""
        scales = scales_of(graph)
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def reduction(name: str, dim: int) -> Tensor:
            values = weights[name].float().abs()
            return reduce_others(values if name in scales else values * 0, dim)

        factors = sum_over_members(graph, reduction)
        touched = {g.name for g in graph.prunable if any(m.parameter in scales for m in g.members)}
        if len(touched) == len(factors):
            return factors
        norms = L2().score(model, graph, batches)
        return {name: factors[name] if name in touched else norms[name] for name in factors}


def scales_of(graph: DependencyGraph) -> set[str]:
    """Names of the parameters that are a norm's weight, or multiplied with an activation.

    Parameters
    ----------
    graph : DependencyGraph

    Returns
    -------
    set of str
    """
    names = {node: n for n, node in graph.traced.tensors.items() if n in graph.traced.parameters}
    active = set(graph.traced.inputs)
    operands: list[fx.Node | None] = []
    for node in graph.traced.nodes:
        if active.isdisjoint(node.all_input_nodes):
            continue  # computed from parameters alone
        active.add(node)
        op = op_name(node).rstrip("_")
        if op in _NORMS:
            operands.append(arguments(node).get("weight"))
        elif op == "aten.mul":
            operands.extend(node.all_input_nodes)
    return {names[operand] for operand in operands if operand in names}
