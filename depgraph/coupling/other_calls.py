"""Traces a model at other calls than the traced one, where it may run other ops.

Code may ask for the batch, a size, a type, or for gradients: what it runs then has to fit a cut as
well. One other batch and one other size are tried where code decides by sizes (`_deciding`), all
else where parameters are not read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.coupling.axes import axis_atoms, axis_size
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.tracing.calls import Unread
from depgraph.tracing.deciding import Decisions
from depgraph.tracing.meta import on_meta
from depgraph.tracing.modules import named_tensors
from depgraph.tracing.recorder import Recorder
from depgraph.tracing.retyped import with_types
from depgraph.tracing.trace import Trace, TraceError, shape, trace_with
from depgraph.tracing.values import tells_how

_Given = tuple[tuple[Any, ...], dict[str, Any]]
_TYPES = (torch.float64, torch.float32, torch.bfloat16)


def _half(size: int) -> int:
    return max(size // 2, 1)


def _double(size: int) -> int:
    return 2 * size


def _odd(size: int) -> int:
    """A larger size, of the other parity where that of the example is even."""
    return 2 * size + 1 - size % 2


def other_sizes(model: nn.Module, traced: Trace, decides: Decisions) -> tuple[Trace, ...]:
    """Traces of a model at a batch of one, at a larger batch and size, and at sizes asked for.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    traced : Trace
        Of it.
    decides : Decisions
        By which sizes code decides. Of a dimension of the inputs that has such a size, one size is
        tried of each range that would turn an answer.

    Returns
    -------
    tuple of Trace
        Fewer where the model does not run at such a call. The size is that of the second dimension,
        or of the last two of images; a smaller one where a larger one is too large.
    """
    tensors = [x for x in pytree.tree_leaves(traced.example) if isinstance(x, Tensor)]
    if any(x.dim() < 2 for x in tensors):
        return ()
    first = tensors[0].shape
    batch = first[0]
    images = {x.dim() for x in tensors} == {4}
    places = (2, 3) if images else (1,)
    found: list[Trace] = []
    ran: dict[int, set[int]] = {0: {batch}, places[0]: {first[places[0]]}}

    def runs(sizes: dict[int, int]) -> bool:
        given = {dim: (first[dim], size) for dim, size in sizes.items()}
        trace = _trace(model, _with_sizes(traced.example, given))
        if trace is not None:
            found.append(trace)
            for dim in sizes.keys() & ran.keys():
                ran[dim].add(sizes[dim])
        return trace is not None

    runs({0: 1 if batch > 1 else 2})
    for change in (_double,) if images else (_odd, _double, _half):
        if runs({0: 2 * batch + 1, **{dim: change(first[dim]) for dim in places}}):
            break
    for dims in ((0,), places):
        size = first[dims[0]]
        turning = {(low, high) for was, low, high in decides.turning if was == size}
        turning.update((number, number) for number in decides.numbers - {size})
        for low, high in _parts(turning):
            if not any(low <= number <= high for number in ran[dims[0]]):
                ends = (low, high) if low > size else (high, low)
                tried = (number for number in dict.fromkeys(ends) if number < sys.maxsize)
                any(runs(dict.fromkeys(dims, number)) for number in tried)
    return tuple(found)


def _parts(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges cut at the ends of all of them, so that no two of the parts overlap."""
    known = set(ranges)
    starts = sorted({end for low, high in known for end in (low, high + 1)})
    for low, after in pairwise(starts):
        if any(first <= low <= last for first, last in known):
            yield low, after - 1


def runs_alike(p: Propagation, other: Trace) -> bool:
    """Whether a trace of the same model runs the ops of another on the same values and dimensions.

    Its sizes may differ wherever a batch or another dimension of an input comes in, and so may its
    numbers, unless it is of the same call in another mode.
    """
    if other.modes != p.trace.modes and _numbers(other) != _numbers(p.trace):
        return False
    (nodes, place), (others, same_place) = _steps(p.trace), _steps(other)
    return len(nodes) == len(others) and all(
        _does(node, place) == _does(same, same_place) and _as_wide(p, node, same)
        for node, same in zip(nodes, others, strict=True)
    )


def _numbers(trace: Trace) -> list[Any]:
    """The numbers that ops compute with, which a mode may take from a width."""
    values = (leaf for node in trace.nodes for leaf in pytree.tree_leaves(node.args))
    return [value for value in values if isinstance(value, (int, float))]


def _steps(trace: Trace) -> tuple[list[fx.Node], dict[fx.Node, int]]:
    """The nodes of a trace and their places, but for copies, which a size of 1 may save."""
    steps: list[fx.Node] = []
    place: dict[fx.Node, int] = {}
    for node in trace.nodes:
        if node.op == "call_function" and op_name(node) in ("aten.contiguous", "aten.clone"):
            place[node] = place[node.all_input_nodes[0]]
        else:
            place[node] = len(steps)
            steps.append(node)
    return steps, place


def _does(node: fx.Node, place: dict[fx.Node, int]) -> Any:
    """What a node computes, whatever the sizes and numbers."""
    if node.op != "call_function":
        return node.op, [place[x] for x in node.all_input_nodes]
    given = arguments(node)
    stated = [given[name] for name in _stated(node.target) if name in given]
    return node.target, [place[x] for x in node.all_input_nodes], stated


@cache
def _stated(target: Any) -> tuple[str, ...]:
    """Arguments of an op that are no tensors, numbers or sizes: which dimensions, and how."""
    text = str(getattr(target, "_schema", ""))
    return tuple(re.findall(r"[( ](?:int|bool|str)(?:\[\d*\])?\?? (\w+)", text))


def _as_wide(p: Propagation, node: fx.Node, same: fx.Node) -> bool:
    """Whether dimensions of units alone have the sizes that they have in a walk."""
    sizes, axes = shape(same), p.axes(node)
    return len(sizes) == len(shape(node)) and all(
        axis_size(axis) == size or any(atom.frozen for atom in axis_atoms(axis)) or not axis
        for axis, size in zip(axes, sizes, strict=len(axes) > 0)
    )


def other_calls(model: nn.Module, traced: Trace, others: Iterable[Trace]) -> tuple[Trace, ...]:
    """Traces of a model at other calls, each of which reads parameters that no other trace reads.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    traced : Trace
        Of it.
    others : iterable of Trace
        In other modes.

    Returns
    -------
    tuple of Trace
        At a smaller or larger batch or other dimension, in another type, or with gradients enabled.

    Notes
    -----
    Runs the model only where it holds parameters that are not read, and the module to which these
    belong reads some of them at such a call: a mask token costs a few traces of its module.
    """
    read = set().union(*map(_read, (traced, *others)))
    unread = {name for name in traced.parameters if name not in read}
    unread &= _read_by_parts(model, traced, unread)
    found = []
    for trace in _traces(model, traced.example) if unread else ():
        if not unread.isdisjoint(new := _read(trace)):
            found.append(trace)
            unread -= new
        if not unread:
            break
    return tuple(found)


def _read(trace: Trace) -> set[str]:
    """Parameters that a forward reads, whatever comes of it."""
    whole = trace.complete or trace
    return {name for name, node in whole.tensors.items() if node.users}


def _read_by_parts(model: nn.Module, traced: Trace, unread: set[str]) -> set[str]:
    """Those of some unread parameters that the modules which hold them may read at other calls."""
    holders: dict[str, set[str]] = {}
    for name in unread:
        holder = name.rpartition(".")[0]
        while holder and holder not in traced.calls_of:
            holder = holder.rpartition(".")[0]
        holders.setdefault(holder, set()).add(name)
    may = holders.pop("", set())  # the whole model is run below
    for holder, names in holders.items():
        call = traced.calls_of[holder][0]
        given = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (call.args, call.kwargs))
        if any(isinstance(leaf, Unread) for leaf in pytree.tree_leaves(given)):
            continue
        for trace in _traces(model.get_submodule(holder), given):
            may |= {f"{holder}.{name}" for name in _read(trace)} & names
            if names <= may:
                break
    return may


def _traces(model: nn.Module, given: _Given) -> Iterator[Trace]:
    """Traces of the calls that a model takes among those that differ from one in one respect."""
    named = named_tensors(model)[0]
    floating = {name: x.dtype for name, x in named.items() if x.is_floating_point()}
    calls = [(model, given, True), *((model, other, False) for other in _resized(given))]
    for dtype in _TYPES:
        if {dtype} != set(floating.values()):
            copy = with_types(model, dict.fromkeys(floating, dtype))
            calls.append(
                (copy, pytree.tree_map_only(Tensor, cache(partial(_typed, dtype)), given), False)
            )
    for other, example, grad in calls:
        trace = _trace(other, example, grad)
        if trace is not None:
            yield trace


def _trace(model: nn.Module, given: _Given, grad: bool = False) -> Trace | None:
    try:
        return trace_with(model, *given, Recorder, grad)
    except TraceError:
        return None  # the model takes no such call


def _typed(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _resized(given: _Given) -> Iterator[_Given]:
    """Calls with another batch, or with another size."""
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    most = max((x.dim() for x in tensors), default=0)
    places = [(dim,) for dim in range(most)] + ([(most - 2, most - 1)] if most > 3 else [])
    for dims in places:
        sizes = [next(x.shape[dim] for x in tensors if x.dim() > dim) for dim in dims]
        for change in (_half, _double, _odd):
            numbers = [change(size) for size in sizes]
            if numbers != sizes:
                resized = dict(zip(dims, zip(sizes, numbers, strict=True), strict=True))
                yield _with_sizes(given, resized)


def _with_sizes(given: _Given, sizes: dict[int, tuple[int, int]]) -> _Given:
    """Arguments with other sizes of these dimensions, of which each was of the first size."""
    resize = cache(partial(_sized, sizes=sizes))  # what is given twice stays one tensor
    changed: _Given = pytree.tree_map_only(Tensor, resize, given)
    return changed


def _sized(tensor: Tensor, sizes: dict[int, tuple[int, int]]) -> Tensor:
    """A tensor of other sizes, as many entries repeated as it takes; without data where it may."""
    tensor = tensor if tells_how(tensor) else on_meta(tensor)
    for dim, (was, number) in sizes.items():
        if dim < tensor.dim() and tensor.shape[dim] == was:
            places = torch.arange(number, device=tensor.device) % max(was, 1)
            tensor = tensor.index_select(dim, places)
    return tensor
