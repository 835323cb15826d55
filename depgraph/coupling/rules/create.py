"""Ops that make a tensor from sizes: constant ones may be made smaller, counting ones may not."""

from __future__ import annotations

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation, lost, rule


@rule(
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.rand",
    "aten.randn",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.scalar_tensor",
    needs_units=lost,
)
def constant(p: Propagation, node: fx.Node) -> Axes:
    """Every entry is like every other, so any may go."""
    return p.new(node)


@rule(
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
    "aten.rand_like",
    needs_units=lost,
)
def like(p: Propagation, node: fx.Node) -> Axes:
    """The dimensions of the tensor whose shape is taken."""
    return p.axes(node.args[0])


@rule(
    "aten.arange",
    "aten.linspace",
    "aten.logspace",
    "aten.eye",
    "aten.meshgrid",
    "aten.tril_indices",
    needs_units=lost,
)
def counting(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """An entry's value is its position, which removal would change."""
    reason = f"positions counted by {p.label(node)}"
    values = node.meta["val"]
    if isinstance(values, (tuple, list)):
        for operand in node.all_input_nodes:
            p.freeze(operand, reason)
        return [[p.algebra.new(int(size), reason) for size in value.shape] for value in values]
    return p.new(node, reason)
