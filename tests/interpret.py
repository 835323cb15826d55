"""A judge for any traced model: its own ops, run on weights whose removed units are zero.

It runs the traced graph of the original, not the sliced model. Norms, and means that are a step of
one, take their statistics over the kept indices; everything else sees the zeros.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph, Plan
from depgraph.coupling.axes import kept_indices
from depgraph.coupling.propagate import op_name
from depgraph.coupling.rules.reduce import normalises

NORMS = {"aten.layer_norm", "aten.rms_norm", "aten.group_norm", "aten.instance_norm"}


@torch.no_grad()
def masked_outputs(
    graph: DependencyGraph,
    plan: Plan,
    model: nn.Module,
    inputs: tuple[Any, ...],
    weights_stay: bool = False,
) -> list[Tensor]:
    """Output tensors of the original with the units that a plan removes switched off.

    Parameters
    ----------
    graph : DependencyGraph
    plan : Plan
        Of this graph.
    model : nn.Module
        The original; stays as it is.
    inputs : tuple
        At the batch of the trace.
    weights_stay : bool
        Switch off activations alone, wherever they arise: what the forward computes from weights
        is then what it was.

    Returns
    -------
    list of Tensor
    """
    named = (*model.named_parameters(), *model.named_buffers())
    tensors = {name: tensor.detach().clone() for name, tensor in named}
    judge = _Judge(graph, plan, weights_stay)
    state = [
        tensors[name] if weights_stay else judge.masked(node, tensors[name])
        for name, node in graph.traced.tensors.items()
    ]
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return list(judge.run(*state, *leaves))


class _Judge(fx.Interpreter):
    def __init__(self, graph: DependencyGraph, plan: Plan, weights_stay: bool) -> None:
        super().__init__(graph.traced.graph_module)
        self.p = graph.propagation
        self.kept = graph.kept_atoms(plan)
        self.masks = weights_stay
        self.from_weights = set(graph.traced.tensors.values()) if weights_stay else set()

    def indices(self, node: fx.Node) -> list[Tensor]:
        return [kept_indices(axis, self.kept) for axis in self.p.axes(node)]

    def masked(self, node: fx.Node, value: Tensor) -> Tensor:
        """A copy that is zero where units are gone; the value itself where none is."""
        was = value
        for dim, kept in enumerate(self.indices(node)):
            gone = torch.ones(value.shape[dim], dtype=torch.bool)
            gone[kept] = False
            if gone.any():
                value = value.detach().clone() if value is was else value
                value.index_fill_(dim, gone.nonzero().flatten(), 0)
        return value

    def run_node(self, n: fx.Node) -> Any:
        result = self._of(n)
        if not self.masks or n.op != "call_function" or not isinstance(result, Tensor):
            return result
        if all(source in self.from_weights for source in n.all_input_nodes):
            self.from_weights.add(n)
            return result
        return self.masked(n, result)

    def _of(self, n: fx.Node) -> Any:
        if n.op == "call_function" and op_name(n) == "aten._weight_norm":
            return super().run_node(n).nan_to_num()  # what is switched off has no direction
        special = n.op == "call_function" and (
            op_name(n) in NORMS or (op_name(n).startswith("aten.") and normalises(n))
        )
        return self._over_kept(n) if special else super().run_node(n)

    def _over_kept(self, node: fx.Node) -> Tensor:
        """The op on the kept part of its operands, its result put back among zeros."""

        def part(operand: fx.Node) -> Tensor:
            value: Tensor = self.env[operand]
            for dim, kept in enumerate(self.indices(operand)):
                value = value.index_select(dim, kept)
            return value

        args, kwargs = pytree.tree_map_only(fx.Node, part, (node.args, node.kwargs))
        if op_name(node) in ("aten.layer_norm", "aten.rms_norm"):
            args = (args[0], list(args[0].shape[-len(args[1]) :]), *args[2:])
        if op_name(node) == "aten.group_norm":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            each = self.env[source].shape[1] // args[1]
            groups = len({int(index) // each for index in self.indices(source)[1]})
            args = (args[0], groups, *args[2:])
        assert callable(node.target)
        result: Tensor = node.target(*args, **kwargs)
        full = torch.zeros(node.meta["val"].shape, dtype=result.dtype)
        if full.numel():
            full[torch.meshgrid(*self.indices(node), indexing="ij")] = result
        return full
