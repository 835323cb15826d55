"""Broadcasting, which pointwise ops and the leading dimensions of matrix products share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation
from depgraph.tracing.trace import shape


def broadcast(p: Propagation, node: fx.Node, operands: Sequence[tuple[fx.Node, int]]) -> Axes:
    """Join leading dimensions of operands (as many as stated), aligned from the right.

    A dimension of size 1 stretches and couples nothing.
    """
    rank = max(count for _, count in operands)
    source: list[tuple[fx.Node, int] | None] = [None] * rank
    for operand, count in operands:
        for dim in range(count):
            out = rank - count + dim
            if shape(operand)[dim] == 1:
                continue
            first = source[out]
            if first is None:
                source[out] = (operand, dim)
            else:
                p.join(node, first, (operand, dim))
    return [p.axes(place[0])[place[1]] if place else () for place in source]
