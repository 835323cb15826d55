"""Finds forwards that handle the samples of a batch one by one, in a loop that a trace unrolls."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from depgraph.axes import Axis
from depgraph.literals import RANGES, range_of
from depgraph.propagate import Propagation, arguments, op_name
from depgraph.trace import shape

_BY_NUMBER = ("aten.split", "aten.split_with_sizes", "aten.unbind")
"""Ops of which the number of results follows from the size of the dimension that they part."""

_JOINING = ("aten.cat", "aten.concat", "aten.concatenate", "aten.stack")


def goes_through_samples(p: Propagation, nodes: Iterable[fx.Node], batch: Axis) -> bool:
    """Whether ops take every sample of a batch by its number, or put a batch together from parts.

    Parameters
    ----------
    p : Propagation
    nodes : iterable of fx.Node
        Of its trace.
    batch : Axis
        The dimension of the samples.

    Returns
    -------
    bool
        Then the ops are right for batches of the traced size only.
    """
    taken: dict[fx.Node, set[int]] = {}
    for node in nodes:
        name = op_name(node)
        if name in _JOINING:
            a = arguments(node)
            if len(a["tensors"]) > 1 and p.axes(node)[a["dim"]] == batch:
                return True
        elif name in (*_BY_NUMBER, *RANGES, "aten.select"):
            a = arguments(node)
            if p.axes(a["self"])[a["dim"]] != batch:
                continue
            if name in _BY_NUMBER:
                return True
            taken.setdefault(a["self"], set()).update(_indices(node))
    return any(len(found) == p.trace.batch for found in taken.values())


def _indices(node: fx.Node) -> Iterable[int]:
    """The indices that a node takes of a dimension; none where it takes all of them at once."""
    a = arguments(node)
    size = shape(a["self"])[a["dim"]]
    if op_name(node) == "aten.select":
        return [a["index"] % size]
    start, length, step = range_of(node)
    return range(start, start + length * step, step) if length < size else ()
