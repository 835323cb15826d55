"""Multiply-accumulates as products of axes, so that the cost of a plan needs no forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from torch import fx

from depgraph.axes import Atom, Axis, axis_size
from depgraph.propagate import Propagation, arguments, op_name
from depgraph.rules.contract import einsum_places, einsum_terms
from depgraph.rules.convolve import is_transposed
from depgraph.trace import shape

Term = tuple[Axis, ...]


def mac_terms(p: Propagation, nodes: Iterable[fx.Node]) -> list[Term]:
    """One product of axes for each matrix product, convolution and attention.

    Parameters
    ----------
    p : Propagation
        After its run.
    nodes : iterable of fx.Node
        Of its trace.

    Returns
    -------
    list of Term
        Their sizes' products add up to the multiply-accumulates of one forward at the traced
        batch. Biases, norms, activations and softmax are not counted, as is usual.
    """
    terms: list[Term] = []
    for node in nodes:
        if node.op == "call_function" and op_name(node) in _COUNTED:
            terms.extend(_COUNTED[op_name(node)](p, node))
    return terms


def _linear(p: Propagation, node: fx.Node) -> list[Term]:
    return [(*p.axes(node), p.axes(arguments(node)["weight"])[-1])]


def _matmul(p: Propagation, node: fx.Node) -> list[Term]:
    return [(*p.axes(node), p.axes(node.all_input_nodes[0])[-1])]


def _addmm(p: Propagation, node: fx.Node) -> list[Term]:
    return [(*p.axes(node), p.axes(arguments(node)["mat1"])[-1])]


def _convolution(p: Propagation, node: fx.Node) -> list[Term]:
    a = arguments(node)
    weight = p.axes(a["weight"])
    # A transposed convolution does its kernel's work once per input position, not per output.
    places = p.axes(a["input"]) if is_transposed(node) else p.axes(node)
    return [(*places, *weight[1:])]


def _baddbmm(p: Propagation, node: fx.Node) -> list[Term]:
    return [(*p.axes(node), p.axes(arguments(node)["batch1"])[-1])]


def _einsum(p: Propagation, node: fx.Node) -> list[Term]:
    """Two operands at a time, as torch contracts them: all letters of a pair that sums over one.

    What a single operand sums over by itself, and a product without a sum, are no matrix product.
    """
    place = einsum_places(node)
    terms, tensors, kept = einsum_terms(node)
    operands = [
        {letter for dim, letter in enumerate(term) if shape(x)[dim] == _size(place[letter])}
        for term, x in zip(terms, tensors, strict=True)
    ]
    path = iter(arguments(node)["path"] or ())
    found: list[Term] = []
    while len(operands) > 1:
        second, first = sorted((next(path, 0), next(path, 1)), reverse=True)
        right, left = operands.pop(second), operands.pop(first)
        read = set(kept).union(*operands)
        if not left & right <= read:
            counted = [
                name for name in place if name in left & right or name in (left | right) & read
            ]
            found.append(tuple(p.axes(place[name][0])[place[name][1]] for name in counted))
        operands.append((left | right) & read)
    return found


def _size(place: tuple[fx.Node, int]) -> int:
    return shape(place[0])[place[1]]


def _attention(p: Propagation, node: fx.Node) -> list[Term]:
    a = arguments(node)
    q, k, v = (p.axes(a[name]) for name in ("query", "key", "value"))
    return [(*q, k[-2]), (*q[:-1], k[-2], v[-1])]


_COUNTED = {
    "aten.linear": _linear,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.bmm": _matmul,
    "aten._grouped_mm": _matmul,
    "aten.addmm": _addmm,
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.convolution": _convolution,
    "aten.conv_transpose1d": _convolution,
    "aten.conv_transpose2d": _convolution,
    "aten.conv_transpose3d": _convolution,
    "aten.baddbmm": _baddbmm,
    "aten.einsum": _einsum,
    "aten.scaled_dot_product_attention": _attention,
}


def total_macs(terms: Sequence[Term], sizes: Mapping[Atom, int], batch: int) -> int:
    """Multiply-accumulates of one sample when the atoms have these sizes."""
    return sum(prod(axis_size(axis, sizes) for axis in term) for term in terms) // batch


def total_params(p: Propagation, names: Iterable[str], sizes: Mapping[Atom, int]) -> int:
    """Number of scalars in these parameters, tied ones once."""
    return sum(
        prod(axis_size(axis, sizes) for axis in p.axes(p.trace.tensors[name])) for name in names
    )


def value_shape(p: Propagation, node: fx.Node, sizes: Mapping[Atom, int]) -> tuple[int, ...]:
    """Shape that a value has when the atoms have these sizes."""
    axes = p.axes(node)
    return tuple(axis_size(axis, sizes) for axis in axes) if axes else shape(node)
