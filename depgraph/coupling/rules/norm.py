"""Normalisations: over a dimension with weights (statistics of what is kept), and softmax."""

from __future__ import annotations

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation, arguments, lost, rule
from depgraph.coupling.rules.broadcast import broadcast
from depgraph.tracing.trace import shape


def _normalised(p: Propagation, node: fx.Node) -> Axes:
    """What the statistics are taken over."""
    a = arguments(node)
    return p.axes(a["input"])[-len(a["normalized_shape"]) :]


@rule(
    "aten.layer_norm",
    "aten.rms_norm",
    "aten.native_layer_norm",
    "aten._fused_rms_norm",
    needs_units=_normalised,
)
def layer_norm(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """The normalised dimensions are those of weight and bias."""
    a = arguments(node)
    x = a["input"]
    for affine in (a.get("weight"), a.get("bias")):
        if affine is not None:
            first = len(shape(x)) - len(shape(affine))
            for dim in range(len(shape(affine))):
                p.join(node, (x, first + dim), (affine, dim))
    if isinstance(node.meta.get("val"), (tuple, list)):
        lead = p.axes(x)[: len(shape(x)) - len(a["normalized_shape"])]
        ones: Axes = [()] * len(a["normalized_shape"])
        return [p.axes(x), *([[*lead, *ones]] * (len(node.meta["val"]) - 1))]
    return p.axes(x)


@rule("aten.batch_norm", "aten.instance_norm", "aten.group_norm")
def channel_norm(p: Propagation, node: fx.Node) -> Axes:
    """Channel statistics and affine parameters lie along dimension 1, in groups or singly.

    What statistics are taken over besides channels stays whole, as their count changes the result:
    in training alone for those that are learnt.
    """
    a = arguments(node)
    x = a["input"]
    if "num_groups" in a:
        groups = p.algebra.new(a["num_groups"])
        p.equate(node, (x, 1), (*groups, *p.algebra.new(shape(x)[1] // a["num_groups"])))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a.get(name) is not None:
            p.join(node, (x, 1), (a[name], 0))
    others = [dim for dim in range(len(shape(x))) if dim != 1]
    p.freeze(x, f"{p.label(node)} takes statistics over it", others)
    return p.axes(x)


@rule("aten._weight_norm")
def weight_norm(p: Propagation, node: fx.Node) -> Axes:
    """``g v / |v|``: zeros add nothing to the norm."""
    return broadcast(p, node, [(x, len(shape(x))) for x in node.all_input_nodes])


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", needs_units=lost)
def softmax(p: Propagation, node: fx.Node) -> Axes:
    """A removed entry would still count ``exp(0)`` in the sum, so the dimension stays whole."""
    a = arguments(node)
    p.freeze(a["self"], f"{p.label(node)} normalises over it", [a["dim"]])
    return p.axes(a["self"])
