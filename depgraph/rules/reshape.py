"""Ops that rearrange dimensions: views split and merge atoms, the rest carries axes along."""

from __future__ import annotations

from torch import fx

from depgraph.propagate import Axes, Propagation, arguments, rule
from depgraph.trace import shape


@rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten")
def view(p: Propagation, node: fx.Node) -> Axes:
    """Deal the factors out to the new dimensions, in order."""
    return p.algebra.regroup(p.axes(node.args[0]), shape(node), p.label(node))


@rule("aten.unsqueeze", "aten.squeeze")
def ones(p: Propagation, node: fx.Node) -> Axes:
    """Dimensions of size 1 come or go."""
    return p.algebra.regroup(p.axes(node.args[0]), shape(node), p.label(node))


@rule("aten.permute")
def permute(p: Propagation, node: fx.Node) -> Axes:
    """Dimensions in another order."""
    axes = p.axes(node.args[0])
    return [axes[dim] for dim in arguments(node)["dims"]]


@rule("aten.transpose")
def transpose(p: Propagation, node: fx.Node) -> Axes:
    """Two dimensions change places."""
    a = arguments(node)
    axes = p.axes(a["self"])
    i, j = a["dim0"], a["dim1"]
    axes[i], axes[j] = axes[j], axes[i]
    return axes


@rule("aten.t", "aten.numpy_T", "aten.mT")
def matrix_transpose(p: Propagation, node: fx.Node) -> Axes:
    """All dimensions reversed (two of them, for a matrix)."""
    axes = p.axes(node.args[0])
    return axes[::-1]


@rule("aten.expand", "aten.expand_as")
def expand(p: Propagation, node: fx.Node) -> Axes:
    """Copies along a dimension of size 1 are alike; what they meet decides whether they stay."""
    source = node.args[0]
    axes = p.new(node)
    offset = len(axes) - len(shape(source))  # type: ignore[arg-type]
    for dim, axis in enumerate(p.axes(source)):
        if axis:
            axes[offset + dim] = axis
    return axes
