"""Which entries of which weights to multiply for one value to come out multiplied, and no other.

The search walks back from the value through ops that are homogeneous of degree one; the proof then
walks forward from the weights it has found: every value that holds something of theirs must reach
the one read that was asked for. Both carry masks, and ops that only move entries are run on these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor, fx

from depgraph.propagate import arguments, op_name
from depgraph.rules.contract import einsum_terms
from depgraph.trace import Trace, shape


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
_SUMS = _aten("add sub cat concat concatenate stack")
LAYERS = _aten("linear conv1d conv2d conv3d layer_norm rms_norm batch_norm")
_PRODUCTS = _aten("mul div matmul mm bmm einsum")

_LAYOUT = _RESHAPES | _EXPANDS | _MOVES | _COPIES | _WINDOWS | _COMPLEX
PASSING = _LAYOUT | _SUMS | _PRODUCTS | {"getitem"}
"""Ops through which a factor passes from an operand to the result."""

Mask = Tensor
State = Any  # a mask, or a list of them for an op of several results


class _Unproven(Exception):
    """The weights cannot be said; never leaves this module."""


class Weights:
    """Finds the weights behind values of one trace.

    Attributes
    ----------
    reached : int
        The last place in the trace that what was found leads to.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._names = {node: name for name, node in trace.tensors.items()}
        self._walks: list[_Walk] = []
        self.reached = 0

    def behind(self, reads: Mapping[fx.Node, fx.Node]) -> dict[str, Mask] | None:
        """Entries of parameters that, multiplied by a number, multiply just what is read.

        Parameters
        ----------
        reads : mapping of fx.Node to fx.Node
            Calls, and the operand of each that is to be multiplied.

        Returns
        -------
        dict of str to BoolTensor, or None
            By name of the parameter, of its shape. None where there are none, or where they
            multiply something else too.
        """
        for attempt in range(2):  # of two factors either will do: keys, where queries will not
            try:
                found = self._walk(attempt).back(reads)
                last = self._walk(attempt).forth(found, reads)
            except _Unproven:
                continue
            self.reached = max(self.reached, last)
            return {self._names[node]: mask for node, mask in found.items()}
        return None

    def suffice(self, masks: Mapping[str, Mask], reads: Mapping[fx.Node, fx.Node]) -> bool:
        """Whether these entries of parameters, multiplied, multiply just what is read."""
        nodes = {self._trace.tensors[name]: mask for name, mask in masks.items()}
        try:
            self._walk(0).forth(nodes, reads)
        except _Unproven:
            return False
        return True

    def _walk(self, attempt: int) -> _Walk:
        while attempt >= len(self._walks):
            self._walks.append(_Walk(self._trace, last=bool(len(self._walks))))
        return self._walks[attempt]


class _Walk:
    def __init__(self, trace: Trace, last: bool) -> None:
        self.nodes = trace.nodes
        self.place = {node: i for i, node in enumerate(trace.nodes)}
        self.outputs = set(trace.outputs)
        self.parameters = {
            node
            for name, node in trace.tensors.items()
            if name in trace.parameters and node.meta["val"].is_floating_point()
        }
        self.step = -1 if last else 1
        self._carriers: dict[fx.Node, list[fx.Node]] = {}
        for node in trace.nodes:
            if node.op == "call_function":
                found = self._operands(node)
                if any(x in self.parameters or x in self._carriers for x in found):
                    self._carriers[node] = found

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands to multiply for a result to be multiplied; none where that will not do."""
        name, operands = op_name(node), node.all_input_nodes
        if name in LAYERS:
            a = arguments(node)
            return [x for x in (a["weight"], a["bias"]) if x is not None] if a["weight"] else []
        if name in _SUMS:
            a = arguments(node)
            return operands if isinstance(a.get("other", node), fx.Node) else []
        if name in _PRODUCTS:
            offered = operands[:1] if name == "aten.div" else operands[:: self.step]
            able = (x for x in offered if x in self.parameters or x in self._carriers)
            return [x for x in able if _times(node, x) == 1][:1]
        return operands[:1] if name in PASSING else []

    def back(self, reads: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, Mask]:
        """The parameters behind what is read, and what of them is."""
        wanted: dict[fx.Node, State] = {}
        heap: list[int] = []

        def want(node: fx.Node, mask: State) -> None:
            if node not in wanted:
                wanted[node] = mask
                heappush(heap, -self.place[node])
            elif isinstance(mask, list):
                wanted[node] = [_either(*pair) for pair in zip(wanted[node], mask, strict=True)]
            else:
                wanted[node] = wanted[node] | mask

        for operand in reads.values():
            want(operand, torch.ones(shape(operand), dtype=torch.bool))
        found = {}
        while heap:
            node = self.nodes[-heappop(heap)]
            if node in self.parameters:
                found[node] = wanted[node]
                continue
            if node not in self._carriers:
                raise _Unproven
            for operand, mask in _pulled(node, self._carriers[node], wanted[node]):
                if isinstance(mask, list) or mask.any():
                    want(operand, mask)
        return found

    def forth(self, found: Mapping[fx.Node, Mask], reads: Mapping[fx.Node, fx.Node]) -> int:
        """Follow the parameters to everything that holds something of them; its last place."""
        states: dict[fx.Node, State] = dict(found)
        heap = sorted(self.place[user] for node in found for user in node.users)
        done = set()
        while heap:
            node = self.nodes[heappop(heap)]
            if node in done:
                continue
            done.add(node)
            held = {x: states[x] for x in node.all_input_nodes if x in states}
            if node in reads:
                self._read(node, reads[node], held)
                continue
            state = _pushed(node, held)
            if isinstance(state, list) or state.any():
                if node in self.outputs:
                    raise _Unproven
                states[node] = state
                for user in node.users:
                    heappush(heap, self.place[user])
        if not done.issuperset(reads):
            raise _Unproven
        return max(map(self.place.__getitem__, done))

    def _read(self, node: fx.Node, operand: fx.Node, held: Mapping[fx.Node, State]) -> None:
        whole = operand in held and bool(compact(held[operand]).all())
        if not whole or len(held) > 1 or _times(node, operand) > 1:
            raise _Unproven


def _times(node: fx.Node, operand: fx.Node) -> int:
    """How often an op takes an operand."""
    return torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs))).count(operand)


def _either(left: Mask | None, right: Mask | None) -> Mask | None:
    if left is None or right is None:
        return right if left is None else left
    return left | right


def compact(mask: Mask) -> Mask:
    """One of all the entries that share their memory."""
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0 and mask.shape[dim]:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _moved(node: fx.Node, mask: Mask) -> State:
    """The op on a mask in place of its operand."""
    name = op_name(node)
    if name in _RESHAPES:
        return mask.reshape(shape(node))
    if name in _EXPANDS:
        return mask.expand(shape(node))
    return node.target(mask, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _reduced(mask: Mask, size: Sequence[int]) -> Mask:
    """What is asked of an operand of this size that was broadcast."""
    while mask.dim() > len(size):
        mask = mask.any(0)
    for dim, length in enumerate(size):
        if length == 1 and mask.shape[dim] != 1:
            mask = mask.any(dim, keepdim=True)
    return mask


def _channels(node: fx.Node) -> int:
    return 1 if "conv" in op_name(node) or op_name(node) == "aten.batch_norm" else -1


def _pulled(
    node: fx.Node, operands: Sequence[fx.Node], wanted: State
) -> Iterator[tuple[fx.Node, State]]:
    """What has to be multiplied of each of these operands for this of a result to be."""
    name, x = op_name(node), operands[0]
    if name == "getitem":
        parts: list[Mask | None] = [None] * len(x.meta["val"])
        parts[node.args[1]] = wanted  # type: ignore[index]
        yield x, parts
    elif name in _RESHAPES | _MOVES:
        source = torch.zeros(shape(x), dtype=torch.bool)
        moved = _moved(node, source)  # views of the source
        for view, mask in zip(moved, wanted, strict=True) if _several(moved) else [(moved, wanted)]:
            if mask is not None:
                view.logical_or_(mask)
        yield x, source
    elif name in _COPIES:
        yield x, wanted
    elif name in _COMPLEX:
        is_real = name == "aten.view_as_real"
        yield x, wanted.any(-1) if is_real else wanted.unsqueeze(-1).expand(shape(x))
    elif name in _WINDOWS:
        mask = wanted.any(-1) if name == "aten.unfold" else wanted
        for dim, size in enumerate(shape(x)):
            if mask.shape[dim] != size:
                mask = mask.any(dim, keepdim=True).expand(
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
        rows = wanted.movedim(_channels(node), 0).flatten(1).any(1)
        for part in operands:
            yield part, rows.view(-1, *[1] * (len(shape(part)) - 1)).expand(shape(part))
    elif name in _aten("matmul mm bmm"):
        back = -1 if x is node.args[0] else -2
        if min(len(shape(y)) for y in node.all_input_nodes) < 2:
            raise _Unproven
        each = wanted.any(back).unsqueeze(back)
        each = each.movedim(back, -1).expand(*each.movedim(back, -1).shape[:-1], shape(x)[back])
        yield x, _reduced(each.movedim(-1, back), shape(x))
    elif name == "aten.einsum":
        yield x, _einsum_mask(node, None, x, wanted)
    else:
        yield from ((part, _reduced(wanted, shape(part))) for part in operands)


def _pushed(node: fx.Node, held: Mapping[fx.Node, State]) -> State:
    """What of a result is multiplied when this of the operands is."""
    name, operands = op_name(node), node.all_input_nodes
    x, mask = next(iter(held.items()))
    if name == "getitem":
        return mask[node.args[1]]
    if name in _SUMS:
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
    if len(held) > 1 or _times(node, x) > 1:
        raise _Unproven
    if name == "aten.mul" or (name == "aten.div" and x is node.args[0]):
        return mask.expand(shape(node))
    if name in _aten("matmul mm bmm") and min(len(shape(y)) for y in operands) > 1:
        back = -1 if x is node.args[0] else -2
        return _same_along(mask, [back]).unsqueeze(back).expand(shape(node))
    if name == "aten.einsum":
        return _einsum_mask(node, x, None, mask)
    raise _Unproven


def _padded(node: fx.Node, mask: Mask) -> Mask:
    """What is put around is zero, and so may count as multiplied where all else along it is."""
    a = arguments(node)
    if a.get("mode", "constant") != "constant" or a.get("value"):
        raise _Unproven
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
        raise _Unproven
    first, *others = (mask.expand(shape(node)) for mask in masks.values())
    if not all(torch.equal(first, other) for other in others):
        raise _Unproven
    return first


def _pushed_layer(node: fx.Node, held: Mapping[fx.Node, Mask]) -> Mask:
    a = arguments(node)
    weight, bias = a["weight"], a["bias"]
    if weight not in held or (bias is None) != (len(held) == 1) or not {weight, bias} >= set(held):
        raise _Unproven
    if op_name(node) in _aten("layer_norm rms_norm"):
        rows = held[weight]
    else:
        rows = _same_along(held[weight], list(range(1, len(shape(weight)))))
    if bias is not None and not torch.equal(held[bias], rows):
        raise _Unproven
    after = len(shape(node)) - 2 if _channels(node) == 1 else 0
    return rows.view(*rows.shape, *[1] * after).expand(shape(node))


def _same_along(mask: Mask, dims: list[int]) -> Mask:
    """A mask without dimensions along which it does not change."""
    if not dims:
        return mask
    found = mask.any(dims[0]) if len(dims) == 1 else mask.flatten(dims[0], dims[-1]).any(dims[0])
    every = mask.all(dims[0]) if len(dims) == 1 else mask.flatten(dims[0], dims[-1]).all(dims[0])
    if not torch.equal(found, every):
        raise _Unproven
    return found


def _einsum_mask(node: fx.Node, source: fx.Node | None, target: fx.Node | None, mask: Mask) -> Mask:
    """A mask of an einsum's operand as one of its result (source None: the other way round)."""
    terms, tensors, kept = einsum_terms(node)
    of = dict(zip(tensors, terms, strict=True))
    if len(of) != len(tensors) or any(len(set(term)) != len(term) for term in terms):
        raise _Unproven
    before, after = (kept if x is None else of[x] for x in (source, target))
    for dim, letter in reversed(list(enumerate(before))):
        if letter not in after:
            mask = mask.any(dim) if source is None else _same_along(mask, [dim])
    left = [letter for letter in before if letter in after]
    both = [letter for letter in after if letter in left]
    mask = mask.permute([left.index(letter) for letter in both])
    for dim, letter in enumerate(after):
        if letter not in left:
            mask = mask.unsqueeze(dim)
    return mask.expand(shape(node if target is None else target))


def _several(value: Any) -> bool:
    return isinstance(value, (tuple, list))
