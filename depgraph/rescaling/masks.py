"""How a mask of entries that are multiplied goes through an op, in both directions.

Ops that only move entries are run on the mask itself; through a view of zeros, what is asked of a
result is written back to where it is from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depgraph.coupling.propagate import arguments, op_name
from depgraph.coupling.rules.contract import einsum_terms
from depgraph.tracing.trace import shape


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


_RESHAPES = _aten("view reshape _unsafe_view flatten unflatten view_as")
_EXPANDS = _aten("expand expand_as broadcast_to")
_MOVES = _aten(
    "permute transpose swapaxes swapdims t numpy_T mT movedim squeeze unsqueeze select slice narrow"
    " split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk"
)
_COPIES = _aten("contiguous clone _to_copy to type_as float double half detach alias neg dropout")
_WINDOWS = _aten("unfold pad constant_pad_nd")
_COMPLEX = _aten("view_as_complex view_as_real")
SUMS = _aten("add sub cat concat concatenate stack")
LAYERS = _aten("linear conv1d conv2d conv3d layer_norm rms_norm batch_norm")
PRODUCTS = _aten("mul div matmul mm bmm einsum")

_LAYOUT = _RESHAPES | _EXPANDS | _MOVES | _COPIES | _WINDOWS | _COMPLEX
PASSING = _LAYOUT | SUMS | PRODUCTS | {"getitem"}
"""Ops through which a factor passes from an operand to the result."""

Mask = Tensor
State = Any  # a mask, or a list of them for an op of several results


class Unproven(Exception):
    """The weights cannot be said; never leaves this module."""


def is_sum(node: fx.Node) -> bool:
    """Whether an op adds or joins; in place only to what a layer has made for it alone."""
    if op_name(node) != "aten.add_":
        return op_name(node) in SUMS
    first = node.args[0]
    return isinstance(first, fx.Node) and op_name(first) in LAYERS and list(first.users) == [node]


def times(node: fx.Node, operand: fx.Node) -> int:
    """How often an op takes an operand."""
    return torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs))).count(operand)


def either(left: Mask | None, right: Mask | None) -> Mask | None:
    if left is None or right is None:
        return right if left is None else left
    size = torch.broadcast_shapes(left.shape, right.shape)
    left, right = _shared(left.expand(size), right.expand(size))
    return (left | right).expand(size)


def compact(mask: Mask) -> Mask:
    """One of all the entries that share their memory."""
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0 and mask.shape[dim]:
            mask = mask.narrow(dim, 0, 1)
    return mask


def holds_any(mask: Mask) -> bool:
    """Whether an entry is multiplied."""
    return bool(compact(mask).any())


def _any(mask: Mask, dim: int, keepdim: bool = False) -> Mask:
    if mask.stride(dim) == 0 and mask.shape[dim]:
        mask = mask.narrow(dim, 0, 1)
        return mask if keepdim else mask.squeeze(dim)
    return mask.any(dim, keepdim=keepdim)


def _equal(left: Mask, right: Mask) -> bool:
    """Whether masks of one shape agree; what shares memory in both is looked at once."""
    if left.shape != right.shape:
        return False
    return torch.equal(*_shared(left, right))


def _shared(left: Mask, right: Mask) -> tuple[Mask, Mask]:
    """One of all the entries that share their memory in both of two masks of one shape."""
    for dim in range(left.dim()):
        if left.stride(dim) == 0 == right.stride(dim) and left.shape[dim]:
            left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
    return left, right


def _moved(node: fx.Node, mask: Mask) -> State:
    """The op on a mask in place of its operand."""
    name = op_name(node)
    if name in _RESHAPES:
        return _reshaped(mask, shape(node))
    if name in _EXPANDS:
        return mask.expand(shape(node))
    return node.target(mask, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _reshaped(mask: Mask, size: Sequence[int]) -> Mask:
    """A mask in another shape; dims that lead both, and along which it is one, take no memory."""
    lead = 0
    for before, step, after in zip(mask.shape, mask.stride(), size, strict=False):
        if step or before != after or not before:
            break
        lead += 1
    return mask[(0,) * lead].reshape(size[lead:]).expand(size)


def _moved_back(node: fx.Node, size: Sequence[int], wanted: State) -> Mask:
    """What is asked of an operand whose entries an op hands on, some of them or all.

    Dimensions along which no mask changes stay one entry: views on meta say, by their strides,
    which of the operand's dimensions each of theirs is.
    """
    model = torch.empty([max(n, 2) for n in size], device="meta")
    place = {stride: dim for dim, stride in enumerate(model.stride())}
    model = model.as_strided(tuple(size), model.stride())
    whole = _moved(node, model)
    pairs = list(zip(whole, wanted, strict=True)) if _several(whole) else [(whole, wanted)]
    pairs = [(view, mask) for view, mask in pairs if mask is not None]
    same = set(range(len(size)))
    for view, mask in pairs:
        dims = {place.get(stride): j for j, stride in enumerate(view.stride())}
        same = {
            dim
            for dim in same & dims.keys()
            if view.shape[j := dims[dim]] == size[dim] and mask.stride(j) == 0
        }
    source = torch.zeros([1 if d in same else n for d, n in enumerate(size)], dtype=torch.bool)
    moved = _moved(node, source.expand(size))
    parts = zip(moved, wanted, strict=True) if _several(moved) else [(moved, wanted)]
    for view, mask in parts:
        if mask is None:
            continue
        one, asked = _shared(view, mask)
        one.logical_or_(asked)
    return source.expand(size)


def _reduced(mask: Mask, size: Sequence[int]) -> Mask:
    """What is asked of an operand of this size that was broadcast."""
    while mask.dim() > len(size):
        mask = _any(mask, 0)
    for dim, length in enumerate(size):
        if length == 1 and mask.shape[dim] != 1:
            mask = _any(mask, dim, keepdim=True)
    return mask


def _channels(node: fx.Node) -> int:
    return 1 if "conv" in op_name(node) or op_name(node) == "aten.batch_norm" else -1


def pulled(
    node: fx.Node, operands: Sequence[fx.Node], wanted: State
) -> Iterator[tuple[fx.Node, State]]:
    """What has to be multiplied of each of these operands for this of a result to be."""
    name, x = op_name(node), operands[0]
    if name == "getitem":
        parts: list[Mask | None] = [None] * len(x.meta["val"])
        parts[node.args[1]] = wanted  # type: ignore[index]
        yield x, parts
    elif name in _RESHAPES:
        yield x, _reshaped(wanted, shape(x))
    elif name in _MOVES:
        yield x, _moved_back(node, shape(x), wanted)
    elif name in _COPIES:
        yield x, wanted
    elif name in _COMPLEX:
        is_real = name == "aten.view_as_real"
        yield x, _any(wanted, -1) if is_real else wanted.unsqueeze(-1).expand(shape(x))
    elif name in _WINDOWS:
        mask = _any(wanted, -1) if name == "aten.unfold" else wanted
        for dim, size in enumerate(shape(x)):
            if mask.shape[dim] != size:
                mask = _any(mask, dim, keepdim=True).expand(
                    *mask.shape[:dim], size, *mask.shape[dim + 1 :]
                )
        yield x, mask
    elif name == "aten.stack":
        dim = arguments(node)["dim"]
        yield from ((part, wanted.select(dim, i)) for i, part in enumerate(operands))
    elif name in _aten("cat concat concatenate"):
        dim, start = arguments(node)["dim"], 0
        for part in arguments(node)["tensors"]:
            yield part, wanted.narrow(dim, start, shape(part)[dim])
            start += shape(part)[dim]
    elif name in LAYERS and name not in _aten("layer_norm rms_norm"):
        channels = wanted.movedim(_channels(node), 0)
        rows = compact(channels).flatten(1).any(1).expand(len(channels))
        for part in operands:
            yield part, rows.view(-1, *[1] * (len(shape(part)) - 1)).expand(shape(part))
    elif name in _aten("matmul mm bmm"):
        back = -1 if x is node.args[0] else -2
        if min(len(shape(y)) for y in node.all_input_nodes) < 2:
            raise Unproven
        each = _any(wanted, back).unsqueeze(back)
        each = each.movedim(back, -1).expand(*each.movedim(back, -1).shape[:-1], shape(x)[back])
        yield x, _reduced(each.movedim(-1, back), shape(x))
    elif name == "aten.einsum":
        yield x, _einsum_mask(node, None, x, wanted)
    else:
        yield from ((part, _reduced(wanted, shape(part))) for part in operands)


def pushed(node: fx.Node, held: Mapping[fx.Node, State]) -> State:
    """What of a result is multiplied when this of the operands is."""
    name, operands = op_name(node), node.all_input_nodes
    x, mask = next(iter(held.items()))
    if name == "getitem":
        return mask[node.args[1]]
    if is_sum(node):
        return _pushed_sum(node, held)
    if name in _LAYOUT:
        if operands[0] not in held:  # only a shape or a dtype is read
            return torch.zeros((), dtype=torch.bool)
        mask = held[operands[0]]
    if name in _RESHAPES | _EXPANDS | _MOVES | {"aten.unfold"}:
        return _moved(node, mask)
    if name in _WINDOWS:
        return _padded(node, mask)
    if name in _COPIES:
        return mask
    if name == "aten.view_as_real":
        return mask.unsqueeze(-1).expand(shape(node))
    if name == "aten.view_as_complex":
        return _same_along(mask, [-1])
    if name in LAYERS:
        return _pushed_layer(node, held)
    if len(held) > 1 or times(node, x) > 1:
        raise Unproven
    if name == "aten.mul" or (name == "aten.div" and x is node.args[0]):
        return mask.expand(shape(node))
    if name in _aten("matmul mm bmm") and min(len(shape(y)) for y in operands) > 1:
        back = -1 if x is node.args[0] else -2
        return _same_along(mask, [back]).unsqueeze(back).expand(shape(node))
    if name == "aten.einsum":
        return _einsum_mask(node, x, None, mask)
    raise Unproven


def _padded(node: fx.Node, mask: Mask) -> Mask:
    """What is put around is zero, and so may count as multiplied where all else along it is."""
    a = arguments(node)
    if a.get("mode", "constant") != "constant" or a.get("value"):
        raise Unproven
    dims = [d for d, (n, m) in enumerate(zip(mask.shape, shape(node), strict=True)) if n != m]
    for dim in dims:
        mask = _same_along(mask, [dim]).unsqueeze(dim)
    return mask.expand(shape(node))


def _pushed_sum(node: fx.Node, held: Mapping[fx.Node, Mask]) -> Mask:
    zero = torch.zeros((), dtype=torch.bool)
    masks = {x: held.get(x, zero.expand(shape(x))) for x in node.all_input_nodes}
    a = arguments(node)
    if "tensors" in a:
        joined = torch.stack if op_name(node) == "aten.stack" else torch.cat
        return joined([masks[x] for x in a["tensors"]], a["dim"])
    if not isinstance(a["other"], fx.Node):
        raise Unproven
    first, *others = (mask.expand(shape(node)) for mask in masks.values())
    if not all(_equal(first, other) for other in others):
        raise Unproven
    return first


def _pushed_layer(node: fx.Node, held: Mapping[fx.Node, Mask]) -> Mask:
    a = arguments(node)
    weight, bias = a["weight"], a.get("bias")
    if weight not in held or (bias is None) != (len(held) == 1) or not {weight, bias} >= set(held):
        raise Unproven
    if op_name(node) in _aten("layer_norm rms_norm"):
        rows = held[weight]
    else:
        rows = _same_along(held[weight], list(range(1, len(shape(weight)))))
    if bias is not None and not torch.equal(held[bias], rows):
        raise Unproven
    after = len(shape(node)) - 2 if _channels(node) == 1 else 0
    return rows.view(*rows.shape, *[1] * after).expand(shape(node))


def _same_along(mask: Mask, dims: list[int]) -> Mask:
    """A mask without dimensions along which it does not change."""
    if not dims:
        return mask
    for dim in sorted((dim % mask.dim() for dim in dims), reverse=True):
        found = _any(mask, dim)
        if mask.stride(dim) and not _equal(found, mask.all(dim)):
            raise Unproven
        mask = found
    return mask


def _einsum_mask(node: fx.Node, source: fx.Node | None, target: fx.Node | None, mask: Mask) -> Mask:
    """A mask of an einsum's operand as one of its result (source None: the other way round)."""
    terms, tensors, kept = einsum_terms(node)
    of = dict(zip(tensors, terms, strict=True))
    if len(of) != len(tensors) or any(len(set(term)) != len(term) for term in terms):
        raise Unproven
    before, after = (kept if x is None else of[x] for x in (source, target))
    for dim, letter in reversed(list(enumerate(before))):
        if letter not in after:
            mask = _any(mask, dim) if source is None else _same_along(mask, [dim])
    left = [letter for letter in before if letter in after]
    both = [letter for letter in after if letter in left]
    mask = mask.permute([left.index(letter) for letter in both])
    for dim, letter in enumerate(after):
        if letter not in left:
            mask = mask.unsqueeze(dim)
    return mask.expand(shape(node if target is None else target))


def _several(value: Any) -> bool:
    return isinstance(value, (tuple, list))
