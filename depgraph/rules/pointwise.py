"""Ops that treat every element alike: operands are broadcast, equal dimensions become the same."""

from __future__ import annotations

from torch import fx

from depgraph.propagate import Axes, Propagation, rule
from depgraph.trace import shape


@rule(
    "pointwise",  # every op that torch tags as pointwise
    "aten.dropout",
    "aten.alpha_dropout",
    "aten.feature_dropout",
    "aten.bernoulli",
    "aten.contiguous",
    "aten.clone",
    "aten._to_copy",
    "aten.float",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.masked_fill",
)
def pointwise(p: Propagation, node: fx.Node) -> Axes:
    """Align from the right; a dimension of size 1 stretches and couples nothing."""
    sizes = shape(node)
    source: list[tuple[fx.Node, int] | None] = [None] * len(sizes)
    for operand in node.all_input_nodes:
        offset = len(sizes) - len(shape(operand))
        for dim, size in enumerate(shape(operand)):
            out = offset + dim
            if size != sizes[out] or size == 1:
                continue
            first = source[out]
            if first is None:
                source[out] = (operand, dim)
            else:
                p.join(node, first, (operand, dim))
    return [p.axes(place[0])[place[1]] if place else () for place in source]


@rule("aten.to", "aten.type_as")
def cast(p: Propagation, node: fx.Node) -> Axes:
    """Another dtype or device, perhaps those of a second operand, whose shape does not matter."""
    return p.axes(node.args[0])
