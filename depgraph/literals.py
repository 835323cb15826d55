"""Which sizes of a result are numbers in the call, rather than following from the operands."""

from __future__ import annotations

from torch import fx

from depgraph.axes import Axis, same
from depgraph.propagate import Propagation, arguments, op_name
from depgraph.rules.convolve import group_axis

SIZE_ARGUMENTS = {
    "aten.view": "size",
    "aten.reshape": "shape",
    "aten._unsafe_view": "size",
    "aten.expand": "size",
    "aten.zeros": "size",
    "aten.ones": "size",
    "aten.full": "size",
    "aten.empty": "size",
    "aten.rand": "size",
    "aten.new_zeros": "size",
    "aten.new_ones": "size",
    "aten.new_full": "size",
    "aten.new_empty": "size",
    "aten.layer_norm": "normalized_shape",
}
"""Argument that spells out trailing dimensions of an op's result."""

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
        given = arguments(node)[SIZE_ARGUMENTS[name]]
        axes = p.axes(node)[-len(given) :] if given else []
        return [axis for axis, size in zip(axes, given, strict=True) if size != -1]
    if name in GROUPED:
        axis = group_axis(p, node)
        return [axis] if axis else []
    if name in PARTING:
        dim = arguments(node)["dim"]
        parts = [axes[dim] for axes in p.results(node)]
        # Equal parts stay equal whatever is removed: "into three" is no size.
        alike = all(same(part, parts[0]) for part in parts)
        return [] if alike and name in ("aten.chunk", "aten.tensor_split") else parts
    if name in ("aten.slice", "aten.narrow"):
        return [p.axes(node)[arguments(node)["dim"]]]
    return []
