"""Finds the attentions of a trace: fused, or written out as two products around a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import fx

from depgraph.coupling.axes import Axis
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.contract import einsum_terms
from depgraph.tracing.trace import shape

_PRODUCTS = ("aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum")
_SCALING = ("aten.scaled_dot_product_attention", "aten.mul", "aten.div")


@dataclass(frozen=True)
class AttentionProduct:
    """One attention: the axes that lead its products, that of q and k, and that of v."""

    node: fx.Node
    lead: list[Axis]
    query_dim: Axis
    value_dim: Axis


def number_of(node: fx.Node) -> float | None:
    """The number by which an op scales a value; None for other ops.

    That of a fused attention is its temperature, given or by default.
    """
    a = arguments(node) if op_name(node) in _SCALING else {}
    if "query" in a:
        return float(a["scale"] if a["scale"] is not None else shape(a["query"])[-1] ** -0.5)
    return float(a["other"]) if isinstance(a.get("other"), (int, float)) else None


def attention_products(p: Propagation) -> Iterator[AttentionProduct]:
    """Every attention of a trace."""
    for node in p.trace.nodes:
        if node.op != "call_function":
            continue
        if op_name(node) == "aten.scaled_dot_product_attention":
            a = arguments(node)
            q, v = p.axes(a["query"]), p.axes(a["value"])
            yield AttentionProduct(node, q[:-2], q[-1], v[-1])
        elif op_name(node) in ("aten.softmax", "aten._softmax"):
            product, _ = _nearest_product(p, node, forward=False)
            weighted, weights = _nearest_product(p, node, forward=True)
            if product is not None:
                value_dim = () if weighted is None else _columns(p, weighted, weights)
                yield AttentionProduct(node, p.axes(product)[:-2], _summed(p, product), value_dim)


def _nearest_product(
    p: Propagation, node: fx.Node, forward: bool
) -> tuple[fx.Node | None, fx.Node]:
    """The matrix product before or after a node, and the last value between.

    All of its shape, or of another view of it: shifted windows take their mask in one.
    """
    size = shape(node)
    seen, queue = set(), [node]
    while queue:
        at = queue.pop(0)
        for near in at.users if forward else at.all_input_nodes:
            if near in seen or near.op != "call_function":
                continue
            seen.add(near)
            if _is_product(p, near) and (forward or shape(near) == size):
                return near, at
            if prod(shape(near)) == prod(size):
                queue.append(near)
    return None, node


def _is_product(p: Propagation, node: fx.Node) -> bool:
    """Whether an op sums over what two activations share; a parameter only mixes heads, say."""
    if op_name(node) != "aten.einsum":
        return op_name(node) in _PRODUCTS
    terms, tensors, kept = einsum_terms(node)
    held = set(p.trace.tensors.values())
    active = [set(term) for term, x in zip(terms, tensors, strict=True) if x not in held]
    return len(active) == 2 and not active[0] & active[1] <= set(kept)


def _summed(p: Propagation, node: fx.Node) -> Axis:
    """What a product sums over."""
    if op_name(node) == "aten.einsum":
        terms, tensors, kept = einsum_terms(node)
        names = zip(terms[0], p.axes(tensors[0]), strict=True)
        shared = set(terms[1]) - set(kept)
        return tuple(factor for name, axis in names if name in shared for factor in axis)
    a = arguments(node)
    return p.axes(a["batch1"] if op_name(node) == "aten.baddbmm" else node.args[0])[-1]


def _columns(p: Propagation, node: fx.Node, weights: fx.Node) -> Axis:
    """What a product has that the weights of the attention, one of its factors, have not."""
    if op_name(node) != "aten.einsum":
        return p.axes(node)[-1]
    terms, tensors, kept = einsum_terms(node)
    own = set(terms[tensors.index(weights)])
    pairs = [(term, x) for term, x in zip(terms, tensors, strict=True) if x is not weights]
    factors = [(term, x) for term, x in pairs if own & set(term) - set(kept)]
    if not factors:  # weights times weights
        return ()
    term, values = factors[0]
    read = set(kept).union(*(other for other, x in pairs if x is not values))
    names = zip(term, p.axes(values), strict=True)
    return tuple(factor for name, axis in names if name in read - own for factor in axis)
