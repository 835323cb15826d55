"""Reductions: a sum over a dimension may lose zeros, a mean or a maximum over it may not.

A mean or variance that serves to normalise the very tensor it was taken of is a norm written out
(`rules.written`), and takes its statistics over what is kept, like any other norm.
"""

from __future__ import annotations

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation, arguments, lost, nothing, rule
from depgraph.coupling.rules.broadcast import broadcast
from depgraph.coupling.rules.written import normalises
from depgraph.tracing.trace import shape


@rule("aten.sum", needs_units=nothing)
@rule("aten.linalg_vector_norm", "aten.norm", "aten.nansum", "aten.count_nonzero", needs_units=lost)
def total(p: Propagation, node: fx.Node) -> Axes:
    """Zeros add nothing: the reduced dimensions need not stay whole."""
    return _reduced(p, node)


@rule(
    "aten.mean",
    "aten.amax",
    "aten.amin",
    "aten.var",
    "aten.std",
    "aten.var_mean",
    "aten.std_mean",
    "aten.max",
    "aten.min",
    "aten.aminmax",
    "aten.logsumexp",
    "aten.prod",
    "aten.any",
    "aten.all",
    "aten.argmax",
    "aten.argmin",
    needs_units=lost,
)
def statistic(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """The count, or a zero among the entries, changes the result: what is reduced stays whole."""
    if len(node.all_input_nodes) > 1:  # ``max(a, b)``
        return broadcast(p, node, [(x, len(shape(x))) for x in node.all_input_nodes])
    if not normalises(node):
        p.freeze(reduced_tensor(node), f"{p.label(node)} reduces over it", reduced_dims(node))
    axes = _reduced(p, node)
    values = node.meta["val"]
    return [axes] * len(values) if isinstance(values, (tuple, list)) else axes


@rule("aten.histc", "aten.bincount", needs_units=lost)
def counted(p: Propagation, node: fx.Node) -> Axes:
    """How many entries fall in each bin: every entry counts."""
    for operand in node.all_input_nodes:
        p.freeze(operand, f"{p.label(node)} counts its entries")
    return p.new(node, f"bins of {p.label(node)}")


def reduced_tensor(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def reduced_dims(node: fx.Node) -> list[int]:
    rank = len(shape(reduced_tensor(node)))
    dims = arguments(node).get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)] if rank else []


def _reduced(p: Propagation, node: fx.Node) -> Axes:
    gone = reduced_dims(node)
    axes = p.axes(reduced_tensor(node))
    if arguments(node).get("keepdim"):
        return [() if dim in gone else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in gone]
