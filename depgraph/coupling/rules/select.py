"""Ops that join, part or index dimensions: concatenation and its reverse, and gathered tables."""

from __future__ import annotations

import operator

import torch
from torch import fx

from depgraph.coupling.axes import Axis, axis_size
from depgraph.coupling.propagate import Axes, Propagation, arguments, lost, rule
from depgraph.coupling.rules.broadcast import broadcast
from depgraph.tracing.trace import shape


@rule("aten.cat", "aten.concat", "aten.concatenate", needs_units=lost)
def cat(p: Propagation, node: fx.Node) -> Axes:
    """End to end along one dimension; the others are the same."""
    a = arguments(node)
    # torch still takes an empty 1-d tensor in a concatenation of any rank
    tensors = [t for t in a["tensors"] if shape(t) != (0,)] or a["tensors"][:1]
    rank = len(shape(node))
    dim = a["dim"] % rank
    for other in range(rank):
        if other != dim:
            for tensor in tensors[1:]:
                p.join(node, (tensors[0], other), (tensor, other))
    axes = p.axes(tensors[0])
    parts = [p.axes(tensor)[dim] for tensor in tensors]
    axes[dim] = p.algebra.concat(parts, f"positions joined by {p.label(node)}")
    return axes


@rule("aten.stack", needs_units=lost)
def stack(p: Propagation, node: fx.Node) -> Axes:
    """A new dimension that tells the tensors apart."""
    a = arguments(node)
    first, *others = a["tensors"]
    for tensor in others:
        for dim in range(len(shape(tensor))):
            p.join(node, (first, dim), (tensor, dim))
    axes = p.axes(first)
    count = len(a["tensors"])
    axes.insert(a["dim"] % (len(axes) + 1), (p.algebra.selector(count),) if count > 1 else ())
    return axes


@rule(operator.getitem.__name__, needs_units=lost)
def getitem(p: Propagation, node: fx.Node) -> Axes:
    """One result of an op that returns several."""
    source, index = node.args[:2]
    return p.results(source)[index]  # type: ignore[arg-type,index]


@rule("aten.unbind", needs_units=lost)
def unbind(p: Propagation, node: fx.Node) -> list[Axes]:
    """One value for each index of a dimension, which therefore stays whole."""
    a = arguments(node)
    x, dim = a["self"], a["dim"] % len(shape(a["self"]))
    p.freeze(x, f"{p.label(node)} tells its indices apart", [dim])
    axes = p.axes(x)
    return [[*axes[:dim], *axes[dim + 1 :]]] * shape(x)[dim]


@rule("aten.select", needs_units=lost)
def select(p: Propagation, node: fx.Node) -> Axes:
    """One index of a dimension, which therefore stays whole."""
    a = arguments(node)
    x, dim = a["self"], a["dim"] % len(shape(a["self"]))
    p.freeze(x, f"{p.label(node)} takes one index of it", [dim])
    axes = p.axes(x)
    return [*axes[:dim], *axes[dim + 1 :]]


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    "aten.unsafe_split",
    "aten.unsafe_chunk",
    needs_units=lost,
)
def split(p: Propagation, node: fx.Node) -> list[Axes]:
    """Pieces of a dimension, each with atoms of its own where it can be cut there."""
    a = arguments(node)
    x = a["self"]
    dim = a["dim"] % len(shape(x))
    out: list[Axes] = []
    start = 0
    for piece in node.meta["val"]:
        end = start + int(piece.shape[dim])
        axes = p.axes(x)
        axes[dim] = _part(p, node, x, dim, start, end)
        out.append(axes)
        start = end
    return out


@rule("aten.glu", needs_units=lost)
def glu(p: Propagation, node: fx.Node) -> Axes:
    """``a * sigmoid(b)`` for the halves a and b of a dimension."""
    a = arguments(node)
    x = a["self"]
    dim = a["dim"] % len(shape(x))
    half = shape(x)[dim] // 2
    left, right = (_part(p, node, x, dim, start, start + half) for start in (0, half))
    p.algebra.unify(left, right, p.label(node))
    axes = p.axes(x)
    axes[dim] = p.algebra.resolve(left)
    return axes


@rule("aten.slice", "aten.narrow", needs_units=lost)
def slice_(p: Propagation, node: fx.Node) -> Axes:
    """A range of a dimension."""
    a = arguments(node)
    x = a["self"]
    dim = a["dim"] % len(shape(x))
    size = shape(x)[dim]
    start = min(_wrap(a.get("start") or 0, size), size)
    length = shape(node)[dim]
    axes = p.axes(x)
    step = a.get("step", 1)
    if step != 1:
        taken = p.algebra.strided(axes[dim], step) if start < step else None
        if taken is None or axis_size(taken) != length:
            p.freeze(x, f"{p.label(node)} takes every {step}th index of it", [dim])
            taken = p.algebra.new(length, f"strided by {p.label(node)}")
        axes[dim] = taken
    else:
        axes[dim] = _part(p, node, x, dim, start, start + length)
    return axes


def _wrap(index: int, size: int) -> int:
    return max(index + size, 0) if index < 0 else index


def _part(p: Propagation, node: fx.Node, x: fx.Node, dim: int, start: int, end: int) -> Axis:
    axis = p.axes(x)[dim]
    if start == end:
        return p.algebra.new(0)
    taken = p.algebra.take(axis, start, end)
    if taken is not None and axis_size(taken) == end - start:
        return taken
    reason = f"{p.label(node)} takes a range of it"
    p.freeze(x, reason, [dim])
    return p.algebra.new(end - start, reason)


@rule("aten.index", needs_units=lost)
def index(p: Propagation, node: fx.Node) -> Axes:
    """``x[i, j, :]`` with tensors of indices: what they index stays whole."""
    a = arguments(node)
    x, indices = a["self"], list(a["indices"])
    if any(item is not None and item.meta["val"].dtype in _MASKS for item in indices):
        return _picked(p, node, x, indices)
    places = [dim for dim, item in enumerate(indices) if item is not None]
    p.freeze(x, f"{p.label(node)} looks entries up in it", places)
    lookup = broadcast(p, node, [(indices[dim], len(shape(indices[dim]))) for dim in places])
    axes = p.axes(x)
    rest = [axis for dim, axis in enumerate(axes) if dim not in places]
    together = places == list(range(places[0], places[-1] + 1))
    first = places[0] if together else 0
    return [*rest[:first], *lookup, *rest[first:]]


_MASKS = (torch.bool, torch.uint8)


def _picked(p: Propagation, node: fx.Node, x: fx.Node, indices: list[fx.Node | None]) -> Axes:
    """``x[mask]``: a mask tells the entries of all dimensions apart that it lies along."""
    reason = f"{p.label(node)} picks entries of it"
    covered: list[int] = []
    at = 0
    for item in indices:
        ranks = len(shape(item)) if item is not None and item.meta["val"].dtype in _MASKS else 1
        covered.extend(range(at, at + ranks) if item is not None else ())
        at += ranks
    p.freeze(x, reason, covered)
    for item in indices:
        p.freeze(item, reason)
    rest = [axis for dim, axis in enumerate(p.axes(x)) if dim not in covered]
    together = covered == list(range(covered[0], covered[-1] + 1))
    first = covered[0] if together else 0
    count = len(shape(node)) - len(rest)
    found = [p.algebra.new(size, reason) for size in shape(node)[first : first + count]]
    return [*rest[:first], *found, *rest[first:]]


@rule("aten.nonzero", "aten.nonzero_numpy", "aten.argwhere", needs_units=lost)
def places(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Where a condition holds, as indices."""
    reason = f"positions found by {p.label(node)}"
    p.freeze(node.all_input_nodes[0], reason)
    values = node.meta["val"]
    if not isinstance(values, (tuple, list)):
        return p.new(node, reason)
    return [[p.algebra.new(int(size), reason) for size in value.shape] for value in values]


@rule("aten.index_select", needs_units=lost)
def index_select(p: Propagation, node: fx.Node) -> Axes:
    """One dimension looked up by a tensor of indices."""
    a = arguments(node)
    dim = a["dim"] % len(shape(a["self"]))
    p.freeze(a["self"], f"{p.label(node)} looks entries up in it", [dim])
    axes = p.axes(a["self"])
    axes[dim] = (p.axes(a["index"]) or [()])[0]
    return axes


@rule("aten.embedding")
def embedding(p: Propagation, node: fx.Node) -> Axes:
    """``W[indices]``: the rows stay whole, the columns are carried."""
    a = arguments(node)
    p.freeze(a["weight"], f"{p.label(node)} looks entries up in it", [0])
    return [*p.axes(a["indices"]), p.axes(a["weight"])[1]]


@rule("aten.gather", "aten.take_along_dim")
def gather(p: Propagation, node: fx.Node) -> Axes:
    """One dimension looked up, by indices of its own for each place in the others."""
    a = arguments(node)
    x, indices = a["self"], a["index" if "index" in a else "indices"]
    dim = a["dim"] % len(shape(x))
    p.freeze(x, f"{p.label(node)} looks entries up in it", [dim])
    for other in range(len(shape(x))):
        if other != dim and shape(x)[other] == shape(indices)[other]:
            p.join(node, (x, other), (indices, other))
        elif other != dim:
            p.freeze(x, f"{p.label(node)} takes a part of it", [other])
    return p.axes(indices)


@rule("aten.topk", "aten.sort", "aten.cummax", "aten.cummin", "aten.kthvalue", "aten.median")
def ordered(p: Propagation, node: fx.Node) -> list[Axes]:
    """Values and indices along a dimension that is ordered, which therefore stays whole."""
    a = arguments(node)
    x = a["self"]
    dim = a["dim"] % len(shape(x))
    p.freeze(x, f"{p.label(node)} orders it", [dim])
    axes = p.axes(x)
    for result in node.meta["val"]:
        if len(result.shape) < len(axes):
            del axes[dim]
        else:
            axes[dim] = p.algebra.new(int(result.shape[dim]), f"ordered by {p.label(node)}")
        break
    return [axes] * len(node.meta["val"])


@rule(
    "aten.argsort",
    "aten.cumsum",
    "aten.cumprod",
    "aten.flip",
    "aten.roll",
    "aten.tril",
    "aten.triu",
)
def in_order(p: Propagation, node: fx.Node) -> Axes:
    """The order along these dimensions matters, so they stay whole."""
    a = arguments(node)
    x = a["self"]
    dims = a.get("dims", a.get("dim"))
    if dims is None or dims == []:
        dims = [-2, -1] if "diagonal" in a else range(len(shape(x)))
    dims = [dims] if isinstance(dims, int) else dims
    p.freeze(x, f"{p.label(node)} depends on its order", [dim % len(shape(x)) for dim in dims])
    return p.axes(x)
