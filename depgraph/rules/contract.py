"""Ops that sum over a shared dimension: linear, matrix products, convolution, attention."""

from __future__ import annotations

from torch import fx

from depgraph.propagate import Axes, Propagation, arguments, rule
from depgraph.rules._broadcast import broadcast
from depgraph.trace import shape


@rule("aten.linear")
def linear(p: Propagation, node: fx.Node) -> Axes:
    """``y[..., o] = x[..., i] W[o, i] + b[o]``."""
    a = arguments(node)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    p.join(node, (x, len(shape(x)) - 1), (weight, 1))
    if bias is not None:
        p.join(node, (weight, 0), (bias, 0))
    return [*p.axes(x)[:-1], p.axes(weight)[0]]


@rule("aten.addmm")
def addmm(p: Propagation, node: fx.Node) -> Axes:
    """``y[m, n] = bias[n] + a[m, k] b[k, n]``."""
    a = arguments(node)
    bias, left, right = a["self"], a["mat1"], a["mat2"]
    p.join(node, (left, 1), (right, 0))
    if shape(bias)[-1:] == shape(right)[-1:]:
        p.join(node, (right, 1), (bias, len(shape(bias)) - 1))
    return [p.axes(left)[0], p.axes(right)[1]]


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(p: Propagation, node: fx.Node) -> Axes:
    """``y[..., m, n] = a[..., m, k] b[..., k, n]``, leading dimensions broadcast."""
    left, right = node.all_input_nodes[0], node.all_input_nodes[-1]
    rank_a, rank_b = len(shape(left)), len(shape(right))
    p.join(node, (left, rank_a - 1), (right, max(rank_b - 2, 0)))
    lead = broadcast(p, node, [(left, max(rank_a - 2, 0)), (right, max(rank_b - 2, 0))])
    rows = [p.axes(left)[-2]] if rank_a > 1 else []
    columns = [p.axes(right)[-1]] if rank_b > 1 else []
    return [*lead, *rows, *columns]


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
def convolution(p: Propagation, node: fx.Node) -> Axes:
    """``y[b, o, ...] = sum_i W[o, i, ...] * x[b, i, ...]``; one group only."""
    a = arguments(node)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    kernel = range(2, len(shape(weight)))
    p.freeze(weight, "extent of a convolution kernel", list(kernel))
    if a["groups"] != 1 or a.get("transposed"):
        reason = f"channels of a grouped or transposed convolution, {p.label(node)}"
        p.freeze(weight, reason)
        p.freeze(x, reason, [1])
    else:
        p.join(node, (x, 1), (weight, 1))
    if bias is not None:
        p.join(node, (weight, 0), (bias, 0))
    spatial = p.new(node, "spatial extent of a convolution's result")[2:]
    channels = p.axes(weight)[0] if not a.get("transposed") else p.new(node, "transposed")[1]
    return [p.axes(x)[0], channels, *spatial]


@rule("aten.scaled_dot_product_attention")
def attention(p: Propagation, node: fx.Node) -> Axes:
    """``softmax(q k^T * scale + mask) v`` with q (..., L, E), k (..., S, E), v (..., S, Ev)."""
    a = arguments(node)
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    rank = len(shape(q))
    for dim in range(rank - 2):
        p.join(node, (q, dim), (k, dim))
        p.join(node, (k, dim), (v, dim))
    p.join(node, (q, rank - 1), (k, rank - 1))
    p.join(node, (k, rank - 2), (v, rank - 2))
    if a["enable_gqa"]:
        for operand in (q, k, v):
            p.freeze(operand, f"query groups of {p.label(node)}", [rank - 3])
    if mask is not None:
        _join_mask(p, node, q, k, mask)
    p.freeze(k, f"{p.label(node)} normalises over it", [rank - 2])
    return [*p.axes(q)[:-1], p.axes(v)[-1]]


def _join_mask(p: Propagation, node: fx.Node, q: fx.Node, k: fx.Node, mask: fx.Node) -> None:
    rank, mask_rank = len(shape(q)), len(shape(mask))
    for dim in range(mask_rank):
        place = rank - mask_rank + dim
        operand = (k, rank - 2) if place == rank - 1 else (q, place)
        if shape(mask)[dim] != 1:
            p.join(node, operand, (mask, dim))
