"""Reductions: a sum over a dimension may lose zeros, a mean or a maximum over it may not.

A mean or variance that serves to normalise the very tensor it was taken of is a norm written out,
and takes its statistics over what is kept, like any other norm.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from depgraph.propagate import Axes, Propagation, arguments, lost, nothing, op_name, rule
from depgraph.rules._broadcast import broadcast
from depgraph.trace import shape


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


def normalises(node: fx.Node) -> bool:
    """Whether a mean or variance is a step of a norm that is written out.

    ``x - mean(x)``, and ``rsqrt`` or ``sqrt`` of ``mean(x^2)`` or of a variance, which then scales
    a tensor of the shape that was reduced.

    Parameters
    ----------
    node : fx.Node
        A reduction.

    Returns
    -------
    bool
    """
    name = op_name(node)
    readers = list(_readers(node))
    if name == "aten.mean":
        x = reduced_tensor(node)
        centres = all(_is(user, "sub") and user.args[0] is x for user in readers)
        return bool(readers) and (centres or (_is_square(x) and _become_scales(readers)))
    return name in ("aten.var", "aten.std") and bool(readers) and _become_scales(readers)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Users, past casts."""
    for user in node.users:
        if _is(user, "to", "_to_copy", "float", "type_as"):
            yield from _readers(user)
        else:
            yield user


def _is_square(node: fx.Node) -> bool:
    if _is(node, "pow"):
        return bool(node.args[1] == 2)
    return _is(node, "square") or (_is(node, "mul") and node.args[0] is node.args[1])


def _become_scales(readers: list[fx.Node]) -> bool:
    """Whether every reader leads, over ``+ eps``, to a square root that scales."""
    return all(
        _is(user, "rsqrt", "sqrt")
        or (_is(user, "pow") and user.args[1] in (0.5, -0.5))
        or (_is(user, "add", "clamp", "clamp_min") and _become_scales(list(_readers(user))))
        for user in readers
    )


def _is(node: fx.Node, *names: str) -> bool:
    return node.op == "call_function" and op_name(node).rstrip("_") in {f"aten.{n}" for n in names}


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
