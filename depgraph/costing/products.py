"""What each op multiplies and sums, as products of the axes of its operands.

Counted is what sums products: matrix products, convolutions, attention, recurrent layers. Biases,
norms, softmax, activations and other elementwise work are not, nor products without a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import fx

from depgraph.costing.work import batch_atoms
from depgraph.coupling.axes import Atom, Axis, axis_size
from depgraph.coupling.propagate import Propagation, arguments
from depgraph.coupling.rules.contract import einsum_places, einsum_terms
from depgraph.coupling.rules.convolve import is_transposed
from depgraph.tracing.trace import shape


@dataclass(frozen=True, eq=False)
class Product:
    """As many multiply-accumulates as the sizes of these axes multiply to.

    Attributes
    ----------
    axes : tuple of Axis
        What is computed, each entry for itself.
    summed : tuple of Axis
        What each entry is a sum over, or steps along.
    """

    axes: tuple[Axis, ...]
    summed: tuple[Axis, ...]

    def macs(self, sizes: Mapping[Atom, int]) -> int:
        """How many when atoms have these sizes."""
        return prod(axis_size(axis, sizes) for axis in (*self.axes, *self.summed))


@dataclass(frozen=True, eq=False)
class Chain:
    """A product of several matrices in the order that costs least, which the sizes decide.

    Attributes
    ----------
    axes : tuple of Axis
        Rows of the first matrix and columns of the last.
    summed : tuple of Axis
        What neighbours share, in order.
    """

    axes: tuple[Axis, Axis]
    summed: tuple[Axis, ...]

    def macs(self, sizes: Mapping[Atom, int]) -> int:
        """How many when atoms have these sizes."""
        first, last = self.axes
        n = [axis_size(axis, sizes) for axis in (first, *self.summed, last)]
        least = {(i, i + 1): 0 for i in range(len(n) - 1)}
        for span in range(2, len(n)):
            for i in range(len(n) - span):
                j = i + span
                least[i, j] = min(
                    least[i, k] + least[k, j] + n[i] * n[k] * n[j] for k in range(i + 1, j)
                )
        return least[0, len(n) - 1]


Count = Product | Chain


def _matmul(left: str, right: str) -> Callable[[Propagation, fx.Node], list[Count]]:
    """Matrices or vectors of these names, or batches of them that broadcast."""

    def count(p: Propagation, node: fx.Node) -> list[Count]:
        a = arguments(node)
        return [_product(p.axes(a[left]), p.axes(a[right]))]

    return count


def _product(a: list[Axis], b: list[Axis]) -> Product:
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    return Product((*_broadcast(a[:-2], b[:-2]), *rows, *columns), (a[-1],))


def _broadcast(left: list[Axis], right: list[Axis]) -> list[Axis]:
    shorter, longer = sorted((left, right), key=len)
    offset = len(longer) - len(shorter)
    met = [x if axis_size(x) > 1 else y for x, y in zip(longer[offset:], shorter, strict=True)]
    return [*longer[:offset], *met]


def _linear(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    *rows, inner = p.axes(a["input"])
    return [Product((*rows, *p.axes(a["weight"])[:-1]), (inner,))]


def _addbmm(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    first, rows, inner = p.axes(a["batch1"])
    second, _, columns = p.axes(a["batch2"])
    summed = second if first == tuple(batch_atoms(p)) else first  # as many as a weight has, if any
    return [Product((rows, columns), (summed, inner))]


def _inner(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    left, right = p.axes(a["self"]), p.axes(a["other"])
    scales = not left or not right  # a scalar
    return [] if scales else [Product((*left[:-1], *right[:-1]), (left[-1],))]


def _tensordot(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    left, right = p.axes(a["self"]), p.axes(a["other"])
    ours = [dim % len(left) for dim in a["dims_self"]]
    theirs = [dim % len(right) for dim in a["dims_other"]]
    free = [axis for dim, axis in enumerate(left) if dim not in ours]
    free += [axis for dim, axis in enumerate(right) if dim not in theirs]
    return [Product(tuple(free), tuple(left[dim] for dim in ours))] if ours else []


def _vecdot(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    axes = _broadcast(p.axes(a["x"]), p.axes(a["y"]))
    summed = axes.pop(a["dim"])
    return [Product(tuple(axes), (summed,))]


def _chain(p: Propagation, node: fx.Node) -> list[Count]:
    (tensors,) = node.args
    first, *rest = [p.axes(x) for x in tensors]  # type: ignore[union-attr]
    ends = first[0] if len(first) > 1 else (), rest[-1][1] if len(rest[-1]) > 1 else ()
    return [Chain(ends, (first[-1], *(axes[1] for axes in rest[:-1])))]


def _power(p: Propagation, node: fx.Node) -> list[Count]:
    """By squaring: one product for each binary digit after the first, one more where it is 1."""
    a = arguments(node)
    matrix = p.axes(a["self"])
    times = abs(a["n"]).bit_length() + abs(a["n"]).bit_count() - 2
    return [_product(matrix, matrix)] * max(times, 0)


def _bilinear(p: Propagation, node: fx.Node) -> list[Count]:
    """``y[..., o] = (x1[..., i] W[o, i, j]) x2[..., j]``, from left to right."""
    a = arguments(node)
    out, first, second = p.axes(a["weight"])
    rows = _broadcast(p.axes(a["input1"])[:-1], p.axes(a["input2"])[:-1])
    return [Product((*rows, out, second), (first,)), Product((*rows, out), (second,))]


def _convolution(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    # A transposed convolution does its kernel's work once per input position, not per output.
    places = p.axes(a["input"] if is_transposed(node) else node)
    return [Product(tuple(places), tuple(p.axes(a["weight"])[1:]))]


def _conv_tbc(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    kernel, channels, out = p.axes(a["weight"])
    return [Product((p.axes(a["self"])[1], out), (p.axes(node)[0], kernel, channels))]


def _grouped(p: Propagation, node: fx.Node) -> list[Count]:
    """Each group is some of the rows, of the columns, or of what is summed over, unless batched."""
    a = arguments(node)
    left, right = p.axes(a["self"]), p.axes(a["mat2"])
    if len(left) == len(right) == 3:
        return [_product(left, right)]
    return [Product((left[-2], right[-1]), (left[-1],))]


def _attention(p: Propagation, node: fx.Node) -> list[Count]:
    a = arguments(node)
    q, k, v = (p.axes(a[name]) for name in ("query", "key", "value"))
    return [Product((*q[:-1], k[-2]), (q[-1],)), Product((*q[:-1], v[-1]), (k[-2],))]


def _recurrent(p: Propagation, node: fx.Node) -> list[Count]:
    """Every step of every sequence goes through each weight of each layer once."""
    a = arguments(node)
    rows = p.axes(a.get("input", a.get("data")))[:-1]
    steps = [rows.pop(-1 if a.get("batch_first") else 0)] if "params" in a else []
    weights = a["params"] if "params" in a else (a["w_ih"], a["w_hh"])
    matrices = [p.axes(weight) for weight in weights if len(shape(weight)) == 2]
    return [Product((*rows, out), (*steps, into)) for out, into in matrices]


def _einsum(p: Propagation, node: fx.Node) -> list[Count]:
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
    found: list[Count] = []
    while len(operands) > 1:
        second, first = sorted((next(path, 0), next(path, 1)), reverse=True)
        right, left = operands.pop(second), operands.pop(first)
        read = set(kept).union(*operands)
        made, summed = (left | right) & read, (left & right) - read
        if summed:
            axes = {name: p.axes(value)[dim] for name, (value, dim) in place.items()}
            found.append(
                Product(*(tuple(axes[x] for x in place if x in some) for some in (made, summed)))
            )
        operands.append(made)
    return found


def _size(place: tuple[fx.Node, int]) -> int:
    return shape(place[0])[place[1]]


Counter = Callable[[Propagation, fx.Node], list[Count]]


def _named(count: Counter, names: str) -> dict[str, Counter]:
    return {f"aten.{name}": count for name in names.split()}


COUNTED = {
    **_named(_linear, "linear"),
    **_named(_matmul("self", "other"), "matmul linalg_matmul vdot"),
    **_named(_matmul("self", "mat2"), "mm bmm _int_mm _scaled_mm"),
    **_named(_matmul("self", "vec"), "mv"),
    **_named(_matmul("self", "tensor"), "dot"),
    **_named(_matmul("mat1", "mat2"), "addmm _addmm_activation"),
    **_named(_matmul("mat", "vec"), "addmv"),
    **_named(_matmul("batch1", "batch2"), "baddbmm"),
    **_named(_addbmm, "addbmm"),
    **_named(_inner, "inner"),
    **_named(_tensordot, "tensordot"),
    **_named(_vecdot, "linalg_vecdot"),
    **_named(_chain, "linalg_multi_dot chain_matmul"),
    **_named(_power, "linalg_matrix_power matrix_power"),
    **_named(_bilinear, "bilinear"),
    **_named(_einsum, "einsum"),
    **_named(_grouped, "_grouped_mm _scaled_grouped_mm"),
    **_named(_convolution, "conv1d conv2d conv3d convolution _convolution"),
    **_named(_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_named(_convolution, "_conv_depthwise2d conv_depthwise3d thnn_conv2d _slow_conv2d_forward"),
    **_named(_conv_tbc, "conv_tbc"),
    **_named(_attention, "scaled_dot_product_attention"),
    **_named(_attention, "_scaled_dot_product_flash_attention_for_cpu"),
    **_named(_attention, "_scaled_dot_product_flash_attention"),
    **_named(_attention, "_scaled_dot_product_efficient_attention"),
    **_named(_attention, "_scaled_dot_product_cudnn_attention"),
    **_named(_recurrent, "lstm gru rnn_tanh rnn_relu"),
    **_named(_recurrent, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
}
"""By the name of an op."""
