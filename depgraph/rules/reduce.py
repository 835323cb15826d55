"""Reductions: a sum over a dimension may lose zeros, a mean or a maximum over it may not."""

from __future__ import annotations

from torch import fx

from depgraph.propagate import Axes, Propagation, arguments, rule
from depgraph.trace import shape


@rule("aten.sum", "aten.linalg_vector_norm")
def total(p: Propagation, node: fx.Node) -> Axes:
    """Zeros add nothing: the reduced dimensions need not stay whole."""
    return _reduced(p, node)


@rule(
    "aten.mean",
    "aten.amax",
    "aten.amin",
    "aten.var",
    "aten.std",
    "aten.logsumexp",
    "aten.prod",
    "aten.any",
    "aten.all",
    "aten.argmax",
    "aten.argmin",
)
def statistic(p: Propagation, node: fx.Node) -> Axes:
    """The count, or a zero among the entries, changes the result: what is reduced stays whole."""
    x = arguments(node)["self"]
    p.freeze(x, f"{p.label(node)} reduces over it", _dims(node))
    return _reduced(p, node)


def _dims(node: fx.Node) -> list[int]:
    a = arguments(node)
    rank = len(shape(a["self"]))
    dims = a.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


def _reduced(p: Propagation, node: fx.Node) -> Axes:
    a = arguments(node)
    gone = _dims(node)
    axes = p.axes(a["self"])
    if a.get("keepdim"):
        return [() if dim in gone else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in gone]
