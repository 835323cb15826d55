"""Finds the calls at which a model reads parameters that the traced call does not.

Layers may belong to another batch, size or type, or to gradients: what they are given then has to
fit a cut as well. Whether a module reads more is tried on that module alone, before the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph._calls import UNREAD
from depgraph._modules import named_tensors
from depgraph._recorder import Recorder
from depgraph._retyped import with_types
from depgraph.trace import Trace, TraceError, trace_with

_Given = tuple[tuple[Any, ...], dict[str, Any]]
_TYPES = (torch.float64, torch.float32, torch.bfloat16)


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
        if any(leaf is UNREAD for leaf in pytree.tree_leaves(given)):
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
            calls.append((copy, pytree.tree_map_only(Tensor, partial(_typed, dtype), given), False))
    for other, (args, kwargs), grad in calls:
        try:
            yield trace_with(other, args, kwargs, Recorder, grad)
        except TraceError:
            continue


def _typed(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _resized(given: _Given) -> Iterator[_Given]:
    """Calls with another batch, or with another size."""
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    most = max((x.dim() for x in tensors), default=0)
    places = [(dim,) for dim in range(most)] + ([(most - 2, most - 1)] if most > 3 else [])
    for dims in places:
        sizes = [next(x.shape[dim] for x in tensors if x.dim() > dim) for dim in dims]
        half = [max(size // 2, 1) for size in sizes]
        double, odd = [2 * size for size in sizes], [2 * size + 1 - size % 2 for size in sizes]
        for numbers in (half, double, odd):
            if numbers != sizes:
                resized = dict(zip(dims, zip(sizes, numbers, strict=True), strict=True))
                resize = partial(_sized, sizes=resized)
                yield pytree.tree_map_only(Tensor, resize, given)


def _sized(tensor: Tensor, sizes: dict[int, tuple[int, int]]) -> Tensor:
    """A tensor of other sizes, as many entries repeated as it takes."""
    for dim, (was, number) in sizes.items():
        if dim < tensor.dim() and tensor.shape[dim] == was:
            places = torch.arange(number, device=tensor.device) % max(was, 1)
            tensor = tensor.index_select(dim, places)
    return tensor
