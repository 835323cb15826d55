"""Traces a sliced model again and compares it with the prediction, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from depgraph.axes import Atom, axis_atoms
from depgraph.cost import value_shape
from depgraph.errors import DepgraphError
from depgraph.literals import PARTING, RANGES
from depgraph.propagate import arguments, op_name
from depgraph.trace import TraceError, shape, trace_forward

if TYPE_CHECKING:
    from depgraph.graph import DependencyGraph


class Mismatch(DepgraphError):
    """A module of the sliced model computes something else than the plan predicts."""

    def __init__(self, module: str, text: str) -> None:
        super().__init__(text)
        self.module = module


def verify(graph: DependencyGraph, small: nn.Module, sizes: Mapping[Atom, int]) -> None:
    """Prove that a sliced model runs the ops of the original at the predicted shapes.

    Parameters
    ----------
    graph : DependencyGraph
        Of the original.
    small : nn.Module
        The sliced model.
    sizes : mapping of Atom to int
        Units left of each pruned atom.

    Raises
    ------
    Mismatch
        Naming the module and the groups, when an op, a shape or a factor differs.
    """
    args, kwargs = graph.traced.example
    modes = {name: module.training for name, module in small.named_modules()}
    for name, module in small.named_modules():
        module.training = graph.traced.modes.get(name, module.training)
    try:
        again = trace_forward(small, args, kwargs)
    except TraceError as error:
        raise Mismatch(error.module, f"the sliced model does not run: {error}") from error
    finally:
        for name, module in small.named_modules():
            module.training = modes[name]
    before = [node for node in graph.traced.nodes if node.op == "call_function"]
    after = [node for node in again.nodes if node.op == "call_function"]
    for old, new in zip(before, after, strict=False):
        _compare(graph, old, new, sizes)
    if len(before) != len(after):
        raise Mismatch(
            "",
            f"the sliced model runs {len(after)} ops, the original {len(before)}; its forward "
            "depends on a size in a way the plan cannot follow",
        )
    for name, node in graph.traced.tensors.items():
        expected = value_shape(graph.propagation, node, sizes)
        if shape(again.tensors[name]) != expected:
            raise Mismatch(
                "", f"parameter '{name}' came out as {shape(again.tensors[name])}, not {expected}"
            )


def _compare(graph: DependencyGraph, old: fx.Node, new: fx.Node, sizes: Mapping[Atom, int]) -> None:
    expected = value_shape(graph.propagation, old, sizes)
    module = graph.traced.owner.get(old, "")
    if _kind(old) == _kind(new) and shape(new) == expected:
        if _factors(old) != _factors(new):
            raise Mismatch(module, f"module '{module}' computes a factor from a pruned size")
        return
    pruned = {group._atom: group.name for group in graph.prunable if group._atom in sizes}
    touched = {
        pruned[atom]
        for value in (old, *old.all_input_nodes)
        for axis in graph.propagation.axes(value)
        for atom in axis_atoms(axis)
        if atom in pruned
    }
    raise Mismatch(
        module,
        f"module '{module}' does not follow the plan: {op_name(new)} "
        f"gives {shape(new)} where {op_name(old)} should give {expected}; keep all units of "
        f"{', '.join(sorted(touched)) or 'the groups it works on'}",
    )


def _kind(node: fx.Node) -> str:
    """An op's name; one name for ops that stand in for each other in generated forwards."""
    name = op_name(node)
    return next((family[0] for family in (PARTING, RANGES) if name in family), name)


def _factors(node: fx.Node) -> list[Any]:
    """Floating-point arguments; the default scale of a fused attention counts as one."""
    if op_name(node) == "aten.scaled_dot_product_attention":
        a = arguments(node)
        scale = a["scale"] if a["scale"] is not None else shape(a["query"])[-1] ** -0.5
        return [round(scale, 9), a["dropout_p"]]
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, float)]
