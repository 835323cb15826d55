"""Convolutions, plain, grouped, depthwise and transposed: channels are ``groups x per_group``."""

from __future__ import annotations

from torch import fx

from depgraph.coupling.axes import Axis, axis_size
from depgraph.coupling.propagate import Axes, Propagation, arguments, op_name, rule
from depgraph.tracing.trace import shape

CONVOLUTIONS = (
    *(f"aten.conv{rank}d" for rank in (1, 2, 3)),
    *(f"aten.conv_transpose{rank}d" for rank in (1, 2, 3)),
    "aten.convolution",
)
"""Ops whose weight is ``(out, in, extents)``; transposed: ``(in, out, extents)``."""


@rule(*CONVOLUTIONS)
def convolution(p: Propagation, node: fx.Node) -> Axes:
    """``y[b, g o, ...] = sum_i W[g o, i, ...] * x[b, g i, ...]``; transposed: ``W[g i, o, ...]``.

    The kernel's extent and the positions it slides over stay whole.
    """
    a = arguments(node)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    rank = len(shape(weight)) - 2
    channel = len(shape(x)) - rank - 1
    p.freeze(weight, "extent of a convolution kernel", range(2, rank + 2))
    positions = _positions(p, node, channel)
    groups = p.algebra.new(a["groups"])
    p.equate(node, (weight, 0), (*groups, *p.algebra.new(shape(weight)[0] // a["groups"])))
    whole, part = (weight, 0), (*groups, *p.axes(weight)[1])
    if is_transposed(node):
        p.join(node, (x, channel), whole)
        out = part
    else:
        p.equate(node, (x, channel), part, (weight, 1))
        out = p.axes(weight)[0]
    if bias is not None:
        p.equate(node, (bias, 0), out, (weight, 0))
    return [*p.axes(x)[:channel], out, *positions]


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution's weight has the input channels first."""
    return "transpose" in op_name(node) or bool(arguments(node).get("transposed"))


def _positions(p: Propagation, node: fx.Node, channel: int) -> Axes:
    """Spatial axes of the result: those of the input where every position is for itself."""
    a = arguments(node)
    x, weight = a["input"], a["weight"]
    spatial = range(channel + 1, len(shape(x)))
    pointwise = all(size == 1 for size in shape(weight)[2:])
    if pointwise and shape(x)[channel + 1 :] == shape(node)[channel + 1 :]:
        return p.axes(x)[channel + 1 :]
    p.freeze(x, f"{p.label(node)} slides over it", spatial)
    return p.new(node, "spatial extent of a convolution's result")[channel + 1 :]


def group_axis(p: Propagation, node: fx.Node) -> Axis:
    """The axis that a convolution's or group norm's number of groups counts; empty for one group.

    It is the part that leads the input's channels.
    """
    a = arguments(node)
    normalises = "num_groups" in a
    groups = a["num_groups" if normalises else "groups"]
    x = a["input"]
    channel = 1 if normalises else len(shape(x)) - len(shape(a["weight"])) + 1
    axis: Axis = ()
    for factor in p.axes(x)[channel]:
        if axis_size(axis) == groups:
            break
        axis = (*axis, factor)
    return axis if axis_size(axis) == groups else ()
