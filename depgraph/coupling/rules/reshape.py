"""Ops that rearrange dimensions: views split and merge atoms, the rest carries axes along."""

from __future__ import annotations

import math
from typing import cast

from torch import fx

from depgraph.coupling.axes import Axis
from depgraph.coupling.propagate import Axes, Propagation, arguments, lost, rule
from depgraph.tracing.trace import shape


@rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.unsqueeze",
    "aten.squeeze",
    needs_units=lost,
)
def view(p: Propagation, node: fx.Node) -> Axes:
    """Deal the factors out to the new dimensions, in order; dimensions of size 1 come or go."""
    if 0 in shape(node):
        return _view_of_nothing(p, node)
    return p.algebra.regroup(p.axes(node.args[0]), shape(node), p.label(node))


def _view_of_nothing(p: Propagation, node: fx.Node) -> Axes:
    """Of a model that was emptied before: sizes say what belongs to what in front alone."""
    x = cast(fx.Node, node.args[0])
    was, sizes = shape(x), shape(node)
    whole = [
        (i, j)
        for j in range(sizes.index(0) + 1)
        for i in range(was.index(0) + 1)
        if math.prod(was[:i]) == math.prod(sizes[:j])
    ]
    i, j = max(whole, key=lambda pair: pair[1])
    front = p.algebra.regroup(p.axes(x)[:i], sizes[:j], p.label(node))
    return [*front, *p.opaque(node, sizes, "of a value that was emptied before")[j:]]


@rule("aten.view_as", "aten.reshape_as", needs_units=lost)
def view_as(p: Propagation, node: fx.Node) -> Axes:
    """A view whose sizes are those of another value, which therefore shrinks with it."""
    axes, other = cast(Axes, view(p, node)), cast(fx.Node, node.args[1])
    for dim, axis in enumerate(axes):
        p.equate(node, (other, dim), axis)
    return axes


@rule("aten.permute", needs_units=lost)
def permute(p: Propagation, node: fx.Node) -> Axes:
    """Dimensions in another order."""
    axes = p.axes(node.args[0])
    return [axes[dim] for dim in arguments(node)["dims"]]


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", needs_units=lost)
def transpose(p: Propagation, node: fx.Node) -> Axes:
    """Two dimensions change places."""
    a = arguments(node)
    axes = p.axes(a["self"])
    name = "dim" if "dim0" in a else "axis"
    i, j = a[f"{name}0"], a[f"{name}1"]
    axes[i], axes[j] = axes[j], axes[i]
    return axes


@rule("aten.t", "aten.numpy_T", needs_units=lost)
def reverse(p: Propagation, node: fx.Node) -> Axes:
    """All dimensions in reverse order."""
    return p.axes(node.args[0])[::-1]


@rule("aten.mT", "aten.mH", "aten.adjoint", needs_units=lost)
def matrix_transpose(p: Propagation, node: fx.Node) -> Axes:
    """The last two dimensions change places."""
    *lead, rows, columns = p.axes(node.args[0])
    return [*lead, columns, rows]


@rule("aten.view_as_complex")
def view_as_complex(p: Propagation, node: fx.Node) -> Axes:
    """The last dimension holds real and imaginary parts, which become one number."""
    x = cast(fx.Node, node.args[0])
    p.freeze(x, f"{p.label(node)} makes one number of it", [len(shape(x)) - 1])
    return p.axes(x)[:-1]


@rule("aten.view_as_real", needs_units=lost)
def view_as_real(p: Propagation, node: fx.Node) -> Axes:
    """The reverse: a last dimension of two."""
    parts = p.algebra.new(2, f"real and imaginary part, told apart by {p.label(node)}")
    return [*p.axes(node.args[0]), parts]


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to", needs_units=lost)
def expand(p: Propagation, node: fx.Node) -> Axes:
    """Copies along a dimension of size 1 are alike; what they meet decides whether they stay.

    Those that another value counts are as many as that one has.
    """
    source, other = node.args[0], arguments(node).get("other")
    axes = p.new(node) if other is None else p.axes(other)
    offset = len(axes) - len(shape(source))  # type: ignore[arg-type]
    for dim, axis in enumerate(p.axes(source)):
        if axis:
            axes[offset + dim] = axis
    return axes


@rule("aten.movedim", needs_units=lost)
def movedim(p: Propagation, node: fx.Node) -> Axes:
    """Some dimensions at other places, the rest in order."""
    a = arguments(node)
    axes = p.axes(a["self"])
    rank = len(axes)
    source, target = (
        [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]
        for dims in (a["source"], a["destination"])
    )
    rest = iter(dim for dim in range(rank) if dim not in source)
    order = [source[target.index(dim)] if dim in target else next(rest) for dim in range(rank)]
    return [axes[dim] for dim in order]


@rule("aten.repeat", "aten.tile", needs_units=lost)
def repeat(p: Propagation, node: fx.Node) -> Axes:
    """Copies laid end to end: ``copies x dimension``."""
    x = cast(fx.Node, node.args[0])
    fresh = len(shape(node)) - len(shape(x))
    axes: Axes = [*[()] * fresh, *p.axes(x)]
    sizes = [*[1] * fresh, *shape(x)]
    copies = [new // old if old else 1 for new, old in zip(shape(node), sizes, strict=True)]
    return [(*_copies(p, node, count), *axis) for count, axis in zip(copies, axes, strict=True)]


@rule("aten.repeat_interleave", needs_units=lost)
def repeat_interleave(p: Propagation, node: fx.Node) -> Axes:
    """Copies of each index side by side: ``dimension x copies``."""
    a = arguments(node)
    x = a["self"]
    if a.get("dim") is None:
        p.freeze(x, f"{p.label(node)} flattens it")
        return p.new(node, f"repeated by {p.label(node)}")
    axes = p.axes(x)
    dim = a["dim"] % len(axes)
    if shape(x)[dim]:
        axes[dim] = (*axes[dim], *_copies(p, node, shape(node)[dim] // shape(x)[dim]))
    return axes


def _copies(p: Propagation, node: fx.Node, count: int) -> Axis:
    return p.algebra.new(count, f"copies made by {p.label(node)}")


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(p: Propagation, node: fx.Node) -> Axes:
    """``groups x rest`` becomes ``rest x groups`` along dimension 1."""
    a = arguments(node)
    axes = p.axes(a["self"])
    size = shape(node)[1]
    groups, rest = p.algebra.regroup([axes[1]], [a["groups"], size // a["groups"]], p.label(node))
    p.algebra.freeze(groups, f"{p.label(node)} shuffles by it")
    return [axes[0], (*rest, *groups), *axes[2:]]
