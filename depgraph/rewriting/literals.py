"""Which sizes of a result are numbers in the call, rather than following from the operands."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from depgraph.coupling.axes import Atom, Axis, kept_indices, same
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.convolve import group_axis
from depgraph.tracing.trace import shape

SIZE_ARGUMENTS = {
    "aten.view": "size",
    "aten.reshape": "shape",
    "aten._unsafe_view": "size",
    "aten.expand": "size",
    "aten.broadcast_to": "size",
    "aten.zeros": "size",
    "aten.ones": "size",
    "aten.full": "size",
    "aten.empty": "size",
    "aten.rand": "size",
    "aten.new_zeros": "size",
    "aten.new_ones": "size",
    "aten.new_full": "size",
    "aten.new_empty": "size",
    "aten.randn": "size",
    "aten.layer_norm": "normalized_shape",
    "aten.rms_norm": "normalized_shape",
    "aten.unflatten": "sizes",
}
"""Argument that spells out dimensions of an op's result, the trailing ones where no other."""

GROUPED = {
    "aten.conv1d": "groups",
    "aten.conv2d": "groups",
    "aten.conv3d": "groups",
    "aten.convolution": "groups",
    "aten.conv_transpose1d": "groups",
    "aten.conv_transpose2d": "groups",
    "aten.conv_transpose3d": "groups",
    "aten.group_norm": "num_groups",
}
"""Argument that counts the groups which lead an op's channels."""

COUNTS = {
    "aten.repeat": "repeats",
    "aten.tile": "dims",
    "aten.repeat_interleave": "repeats",
    "aten.arange": "end",
}
"""Argument that says how many copies an op makes, or how far it counts."""

RANGES = ("aten.slice", "aten.narrow")
"""Ops that take a range of a dimension; a generated forward uses the first for both."""

PARTING = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
"""Ops that part a dimension; a generated forward uses the second for them all."""


def literal_axes(p: Propagation, node: fx.Node) -> list[Axis]:
    """Axes whose sizes are written into a call, or follow from numbers that are.

    Parameters
    ----------
    p : Propagation
    node : fx.Node

    Returns
    -------
    list of Axis
        Empty for an op whose result's shape follows from its operands alone.
    """
    name = op_name(node)
    if name in SIZE_ARGUMENTS:
        return [axis for axis, size in spelled_sizes(p, node) if size != -1]
    if name in GROUPED:
        axis = group_axis(p, node)
        return [axis] if axis else []
    if name in PARTING:
        dim = arguments(node)["dim"]
        parts = [axes[dim] for axes in p.results(node)]
        # Equal parts stay equal whatever is removed: "into three" is no size.
        alike = all(same(part, parts[0]) for part in parts)
        return [] if alike and name in ("aten.chunk", "aten.tensor_split") else parts
    if name in RANGES:
        return [p.axes(node)[arguments(node)["dim"]]]
    return []


def spelled_sizes(p: Propagation, node: fx.Node) -> list[tuple[Axis, int]]:
    """The numbers in an argument of a call, each with the axis that it sizes.

    Parameters
    ----------
    p : Propagation
    node : fx.Node
        A call of one of the ops in `SIZE_ARGUMENTS` or `COUNTS`.

    Returns
    -------
    list of (Axis, int)
        A number is -1 where the call leaves it open. Empty where something else than numbers says
        how many.
    """
    name, a, made = op_name(node), arguments(node), p.axes(node)
    if name in COUNTS:
        return _counted(p, node)
    given = a[SIZE_ARGUMENTS[name]]
    first = len(made) - len(given)
    if name == "aten.unflatten":
        first = a["dim"] % (first + 1)
    return list(zip(made[first : first + len(given)], given, strict=True))


def _counted(p: Propagation, node: fx.Node) -> list[tuple[Axis, int]]:
    name, a, made = op_name(node), arguments(node), p.axes(node)
    given = a[COUNTS[name]]
    if name == "aten.arange":
        plain = not a.get("start") and a.get("step", 1) == 1 and given == shape(node)[0]
        return [(made[0], given)] if plain else []
    source = p.axes(a["self"])
    if name == "aten.repeat_interleave":
        dim = a.get("dim")
        if dim is None or isinstance(given, fx.Node):
            return []
        return [(made[dim][len(source[dim]) :], given)]
    old = [*[()] * (len(made) - len(source)), *source]
    copies = [axis[: len(axis) - len(was)] for axis, was in zip(made, old, strict=True)]
    return list(zip(copies[len(copies) - len(given) :], given, strict=True))


def range_of(node: fx.Node) -> tuple[int, int, int]:
    """First index, number of indices and step of a call of one of the `RANGES`."""
    a = arguments(node)
    size = shape(a["self"])[a["dim"]]
    start = a.get("start") or 0
    start = min(max(start + size, 0) if start < 0 else start, size)
    return start, shape(node)[a["dim"]], a.get("step", 1)


def kept_range(p: Propagation, node: fx.Node, kept: Mapping[Atom, Tensor]) -> tuple[int, int, int]:
    """Start, end and step of the range that is left of a range when atoms keep these units.

    Parameters
    ----------
    p : Propagation
    node : fx.Node
        A call of one of the `RANGES`.
    kept : mapping of Atom to LongTensor

    Returns
    -------
    start, end, step : int
    """
    a = arguments(node)
    indices = kept_indices(p.axes(a["self"])[a["dim"]], kept)
    start, length, step = range_of(node)
    if step != 1:  # every index of a leading factor has all of its neighbours
        return start, len(indices), step
    return int((indices < start).sum()), int((indices < start + length).sum()), 1
