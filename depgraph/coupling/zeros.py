"""Which ops give zero where their operands do, one function for each family of ops.

Each is asked about one atom: is the result zero wherever its index belongs to a removed unit, given
which operands are? No is always safe; an op that no family knows counts as no.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from depgraph.coupling.axes import Atom, axis_atoms
from depgraph.coupling.propagate import Axes, Propagation, arguments
from depgraph.coupling.rules.contract import einsum_terms
from depgraph.tracing.trace import shape

Vanishes = Callable[[fx.Node], bool]
Family = Callable[[Propagation, fx.Node, Atom, Vanishes], bool]
FAMILIES: dict[str, Family] = {}


def _family(*ops: str) -> Callable[[Family], Family]:
    def register(function: Family) -> Family:
        FAMILIES.update((f"aten.{op}", function) for op in ops)
        return function

    return register


def carries(p: Propagation, node: fx.Node, atom: Atom) -> bool:
    """Whether an atom is part of some dimension of a value."""
    results = [p.axes(node)] if p.axes(node) else p.results(node)
    return any(_dims(axes, atom) for axes in results)


def _dims(axes: Axes, atom: Atom) -> list[int]:
    return [dim for dim, axis in enumerate(axes) if atom in axis_atoms(axis)]


def _covered(p: Propagation, node: fx.Node, atom: Atom, by: list[Any]) -> list[bool]:
    """For each operand, whether it has the atom in every dimension in which the result does."""
    out = []
    for value in by:
        axes = p.axes(value)
        offset = len(shape(node)) - len(axes)
        own = {offset + dim for dim in _dims(axes, atom)}
        out.append(own.issuperset(_dims(p.axes(node), atom)))
    return out


@_family(
    # carried along
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("permute", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "mH", "movedim"),
    *("repeat", "tile", "repeat_interleave", "roll", "flip", "tril", "triu"),
    *("cat", "concat", "concatenate", "stack", "split", "split_with_sizes", "chunk", "unbind"),
    *("tensor_split", "slice", "narrow", "select", "index", "index_select", "embedding", "gather"),
    *("constant_pad_nd", "clone", "contiguous", "detach", "alias", "lift_fresh", "_to_copy"),
    *("to", "type_as", "float", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "im2col"),
    *("view_as_complex", "view_as_real", "real", "imag", "conj", "_conj", "resolve_conj"),
    # zero at zero
    *("relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "hardswish"),
    *("hardtanh", "tanh", "tanhshrink", "softsign", "neg", "abs", "sign", "square", "sqrt", "sin"),
    *("erf", "tan", "asin", "atan", "sinh", "expm1", "log1p", "round", "floor", "ceil", "trunc"),
    *("glu", "prelu", "dropout", "feature_dropout", "zeros_like"),
    # of nothing but zeros
    *("sum", "nansum", "mean", "amax", "amin", "var", "std", "norm", "linalg_vector_norm"),
    *("cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)  # fmt: skip
def _kept(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    sources = [x for x in node.all_input_nodes if carries(p, x, atom)]
    return bool(sources) and all(map(zero, sources))


@_family("expand", "expand_as", "broadcast_to")
def _stretched(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    """Copies of one entry are no zeros, whatever they meet later."""
    x = node.all_input_nodes[0]
    return zero(x) and all(_covered(p, node, atom, [x]))


FAMILIES[operator.getitem.__name__] = _kept


@_family("zeros", "new_zeros", "zero")
def _zeros(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    return True


@_family("add", "sub", "rsub", "maximum", "minimum")
def _sum(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    terms = [arguments(node)[name] for name in ("self", "other")]
    nodes = [term for term in terms if isinstance(term, fx.Node)]
    others_are_zero = all(term == 0 for term in terms if not isinstance(term, fx.Node))
    return others_are_zero and all(_covered(p, node, atom, nodes)) and all(map(zero, nodes))


@_family("mul", "multiply")
def _product(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    factors = [x for x in node.all_input_nodes if zero(x)]
    found = {
        len(shape(node)) - len(p.axes(x)) + dim for x in factors for dim in _dims(p.axes(x), atom)
    }
    return found.issuperset(_dims(p.axes(node), atom))


@_family("copy")
def _copied(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    """What was there before is written over."""
    source = arguments(node)["src"]
    return zero(source) and all(_covered(p, node, atom, [source]))


@_family("_weight_norm")
def _weight_norm(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    """A direction that is switched off has no length, and gives nothing, whatever its factor."""
    return zero(arguments(node)["v"])


@_family("div", "true_divide")
def _quotient(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    above, below = node.args[:2]
    if not isinstance(above, fx.Node):
        return False
    undefined = isinstance(below, fx.Node) and zero(below)
    return zero(above) and not undefined and all(_covered(p, node, atom, [above]))


@_family("pow", "clamp", "clamp_min", "clamp_max", "masked_fill")
def _with_number(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    """Zero stays zero for a positive exponent, bounds on both sides of it, or a fill with it."""
    a = arguments(node)
    numbers = [a[name] for name in ("exponent", "min", "max", "value") if a.get(name) is not None]
    x = node.args[0]
    if not isinstance(x, fx.Node) or any(isinstance(number, fx.Node) for number in numbers):
        return False
    fits = {
        "exponent": lambda number: number > 0,
        "min": lambda number: number <= 0,
        "max": lambda number: number >= 0,
        "value": lambda number: number == 0,
    }
    keeps = all(fit(a[name]) for name, fit in fits.items() if a.get(name) is not None)
    return keeps and zero(x) and all(_covered(p, node, atom, [x]))


@_family("addmm")
def _addmm(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    a = arguments(node)
    axes = p.axes(node)
    rows, columns = (atom in axis_atoms(axis) for axis in axes)
    bias_fits = not rows and zero(a["self"])
    return bias_fits and (zero(a["mat2"]) if columns else zero(a["mat1"]))


@_family("linear")
def _linear(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    a = arguments(node)
    return _affine(p, node, atom, zero, len(shape(node)) - 1, a["weight"], a["bias"])


@_family("conv1d", "conv2d", "conv3d", "convolution",
         "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")  # fmt: skip
def _convolution(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    a = arguments(node)
    return _affine(p, node, atom, zero, 1, a["weight"], a["bias"])


def _affine(
    p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes, dim: int, weight: Any, bias: Any
) -> bool:
    """``weight * x + bias``, both along ``dim``; in the other dimensions only x can vanish."""
    places = _dims(p.axes(node), atom)
    own = dim not in places or (
        zero(weight) if isinstance(weight, fx.Node) else zero(node.all_input_nodes[0])
    )
    added = not isinstance(bias, fx.Node) or (places == [dim] and zero(bias))
    return own and added and (places == [dim] or zero(node.all_input_nodes[0]))


@_family("layer_norm", "rms_norm")
def _layer_norm(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    """A norm that is taken over what is kept gives nothing where nothing is kept."""
    a = arguments(node)
    first = len(shape(node)) - len(a["normalized_shape"])
    if all(dim >= first for dim in _dims(p.axes(node), atom)):
        return all(zero(a[x]) for x in ("weight", "bias") if isinstance(a.get(x), fx.Node))
    return zero(node.all_input_nodes[0]) and not isinstance(a.get("bias"), fx.Node)


@_family("batch_norm", "instance_norm", "group_norm")
def _channel_norm(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    a = arguments(node)
    affine = [a[x] for x in ("weight", "bias") if isinstance(a.get(x), fx.Node)]
    channels = _dims(p.axes(node), atom) == [1]
    if affine:
        return channels and all(map(zero, affine))
    mean = a.get("running_mean")
    centred = not isinstance(mean, fx.Node) or zero(mean)
    return channels and ("num_groups" in a or (centred and zero(node.all_input_nodes[0])))


@_family("matmul", "mm", "bmm", "mv", "_grouped_mm")
def _matmul(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    """Rows come from the left factor, columns from the right one, the rest from either."""
    left, right = node.args[:2]
    return _of_factors(p, node, atom, zero, left, right)


@_family("einsum")
def _einsum(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    terms, tensors, letters = einsum_terms(node)
    factors = [(term, x) for term, x in zip(terms, tensors, strict=True) if zero(x)]
    return all(
        any(
            term.index(letters[dim]) in _dims(p.axes(x), atom)
            for term, x in factors
            if letters[dim] in term
        )
        for dim in _dims(p.axes(node), atom)
    )


@_family("scaled_dot_product_attention")
def _attention(p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes) -> bool:
    value = arguments(node)["value"]
    return zero(value) and all(_covered(p, node, atom, [value]))


def _of_factors(
    p: Propagation, node: fx.Node, atom: Atom, zero: Vanishes, left: Any, right: Any
) -> bool:
    rank = len(shape(node))
    if min(len(shape(left)), len(shape(right))) < 2:
        return False
    for dim in _dims(p.axes(node), atom):
        sides = {rank - 2: [left], rank - 1: [right]}.get(dim, [left, right])
        held = [x for x in sides if dim - rank + len(shape(x)) in _dims(p.axes(x), atom)]
        if not any(zero(x) for x in held):
            return False
    return True
