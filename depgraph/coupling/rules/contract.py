"""Ops that sum over a shared dimension: linear, matrix products, einsum, attention."""

from __future__ import annotations

from typing import cast

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation, arguments, nothing, rule
from depgraph.coupling.rules.broadcast import broadcast
from depgraph.tracing.trace import shape


@rule("aten.linear", needs_units=nothing)
def linear(p: Propagation, node: fx.Node) -> Axes:
    """``y[..., o] = x[..., i] W[o, i] + b[o]``; a weight of one dimension has no o."""
    a = arguments(node)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    p.join(node, (x, len(shape(x)) - 1), (weight, len(shape(weight)) - 1))
    if bias is not None and shape(bias):
        p.join(node, (weight, 0), (bias, 0))
    return [*p.axes(x)[:-1], *p.axes(weight)[:-1]]


@rule("aten.addmm", needs_units=nothing)
def addmm(p: Propagation, node: fx.Node) -> Axes:
    """``y[m, n] = bias[n] + a[m, k] b[k, n]``."""
    a = arguments(node)
    bias, left, right = a["self"], a["mat1"], a["mat2"]
    p.join(node, (left, 1), (right, 0))
    if shape(bias)[-1:] == shape(right)[-1:]:
        p.join(node, (right, 1), (bias, len(shape(bias)) - 1))
    return [p.axes(left)[0], p.axes(right)[1]]


@rule("aten.baddbmm", needs_units=nothing)
def baddbmm(p: Propagation, node: fx.Node) -> Axes:
    """``y[b, m, n] = self[b, m, n] + a[b, m, k] b[b, k, n]``, the first broadcast."""
    a = arguments(node)
    first, left, right = a["self"], a["batch1"], a["batch2"]
    p.join(node, (left, 2), (right, 1))
    p.join(node, (left, 0), (right, 0))
    out = [p.axes(left)[0], p.axes(left)[1], p.axes(right)[2]]
    for back in range(1, len(shape(first)) + 1):
        if shape(first)[-back] != 1:
            p.equate(node, (first, len(shape(first)) - back), out[-back])
    return [p.axes(left)[0], p.axes(left)[1], p.axes(right)[2]]


@rule("aten.einsum", needs_units=nothing)
def einsum(p: Propagation, node: fx.Node) -> Axes:
    """Dimensions with the same letter are the same; a letter that is not kept is summed over."""
    place = einsum_places(node)
    terms, tensors, kept = einsum_terms(node)
    for term, tensor in zip(terms, tensors, strict=True):
        for dim, letter in enumerate(term):
            if shape(tensor)[dim] == shape(place[letter][0])[place[letter][1]]:  # not stretched
                p.join(node, place[letter], (tensor, dim))
    return [p.axes(place[name][0])[place[name][1]] for name in kept]


def einsum_places(node: fx.Node) -> dict[str, tuple[fx.Node, int]]:
    """For each letter of an einsum, an operand's dimension that has it at its full size."""
    place: dict[str, tuple[fx.Node, int]] = {}
    terms, tensors, _ = einsum_terms(node)
    for term, tensor in zip(terms, tensors, strict=True):
        for dim, letter in enumerate(term):
            known = place.setdefault(letter, (tensor, dim))
            if shape(tensor)[dim] > shape(known[0])[known[1]]:
                place[letter] = (tensor, dim)
    return place


def einsum_terms(node: fx.Node) -> tuple[list[list[str]], list[fx.Node], list[str]]:
    """The letters of each operand's dimensions, the operands, and the letters of the result."""
    equation, operands = node.args[:2]
    tensors = list(cast("list[fx.Node]", operands))
    before, arrow, after = str(equation).replace(" ", "").partition("->")
    pairs = zip(before.split(","), tensors, strict=True)
    terms = [_letters(text, len(shape(tensor))) for text, tensor in pairs]
    return terms, tensors, _letters(after, len(shape(node))) if arrow else _implicit(terms)


def _letters(term: str, rank: int) -> list[str]:
    """One name for each dimension; those of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    covered = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{back}" for back in range(covered, 0, -1)), *after]


def _implicit(terms: list[list[str]]) -> list[str]:
    """Letters of a result that is not spelled out: those that occur once, in order."""
    names = [name for term in terms for name in term]
    dots = sorted({name for name in names if name.startswith(".")}, reverse=True)
    return [*dots, *sorted(n for n in names if names.count(n) == 1 and not n.startswith("."))]


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", needs_units=nothing)
def matmul(p: Propagation, node: fx.Node) -> Axes:
    """``y[..., m, n] = a[..., m, k] b[..., k, n]``, leading dimensions broadcast."""
    left, right = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    rank_a, rank_b = len(shape(left)), len(shape(right))
    p.join(node, (left, rank_a - 1), (right, max(rank_b - 2, 0)))
    lead = broadcast(p, node, [(left, max(rank_a - 2, 0)), (right, max(rank_b - 2, 0))])
    rows = [p.axes(left)[-2]] if rank_a > 1 else []
    columns = [p.axes(right)[-1]] if rank_b > 1 else []
    return [*lead, *rows, *columns]


@rule("aten._grouped_mm")
def grouped_mm(p: Propagation, node: fx.Node) -> Axes:
    """``y[t, n] = sum_k a[t, k] b[e, k, n]``, where e is the group that row t is in.

    Groups may lie along the rows of a, the columns of b or what is summed over, which then stay
    whole; or along a dimension of both, as in a batched product.
    """
    left, right = (arguments(node)[name] for name in ("self", "mat2"))
    rank_a, rank_b = len(shape(left)), len(shape(right))
    p.join(node, (left, rank_a - 1), (right, rank_b - 2))
    ragged = f"{p.label(node)} parts it in groups"
    if rank_a == rank_b == 2:
        p.freeze(left, ragged, [1])
        return [p.algebra.new(shape(node)[0], ragged), p.axes(left)[0], p.axes(right)[1]]
    if rank_a == rank_b:
        p.join(node, (left, 0), (right, 0))
        return [*p.axes(left)[:2], p.axes(right)[2]]
    p.freeze(left, ragged, [0])
    p.freeze(right, ragged, [0 if rank_b == 3 else 1])
    return [p.axes(left)[-2], p.axes(right)[-1]]


@rule("aten.scaled_dot_product_attention", needs_units=nothing)
def attention(p: Propagation, node: fx.Node) -> Axes:
    """``softmax(q k^T * scale + mask) v`` with q (..., L, E), k (..., S, E), v (..., S, Ev)."""
    a = arguments(node)
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    rank = len(shape(q))
    for dim in range(rank - 2):
        p.join(node, (k, dim), (v, dim))
        if shape(q)[dim] == shape(k)[dim]:
            p.join(node, (q, dim), (k, dim))
        elif a["enable_gqa"] and dim == rank - 3:
            # each key head serves a run of neighbouring query heads
            queries = p.algebra.new(shape(q)[dim] // shape(k)[dim])
            p.equate(node, (q, dim), (*p.axes(k)[dim], *queries), (k, dim))
    p.join(node, (q, rank - 1), (k, rank - 1))
    p.join(node, (k, rank - 2), (v, rank - 2))
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
