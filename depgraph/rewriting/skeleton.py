"""The dense form of a module, without data: what a rewritten forward is read from, at any call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph.rewriting.given import Example, Given, Path
from depgraph.rewriting.raw import ModuleRecorder, RawRecorder
from depgraph.rewriting.symbols import Symbols, hint
from depgraph.tracing.meta import META
from depgraph.tracing.modules import named_modules, named_tensors, structural_copy
from depgraph.tracing.trace import Trace, TraceError, shape, trace_with

_KEPT_TRACES = 16
"""Traces that a skeleton remembers, for modules that are alike."""


@dataclass(frozen=True)
class Traced:
    """One forward, seen twice.

    Attributes
    ----------
    numbers : Trace
        With the numbers of the example, for the algebra.
    raw : Trace
        The same nodes in the same order; sizes are symbols, unless some code cannot have that.
    symbols : Symbols or None
    grad : bool or None
        Whether gradients were enabled, where the forward runs other ops then.
    """

    numbers: Trace
    raw: Trace
    symbols: Symbols | None
    grad: bool | None = None


class Skeleton:
    """A module on the meta device, in the sizes of the dense model.

    Parameters
    ----------
    module : nn.Module
        Is copied.

    Attributes
    ----------
    types : dict of str to torch.dtype
        That its tensors had when it was copied.
    compiled : dict
        Functions that were written for modules that are alike, by their graphs.
    changing : set of str
        Attributes of the module that its forward is known to change.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = structural_copy(module)
        # the sliced module has its hooks, which run around the forward
        self.module._forward_hooks.clear()
        self.module._forward_pre_hooks.clear()
        for inner in named_modules(self.module).values():
            for registry in (inner._parameters, inner._buffers):
                for key, tensor in registry.items():
                    if tensor is not None:
                        registry[key] = _on_meta(tensor, tensor.dtype)  # type: ignore[assignment]
        self.types = {name: x.dtype for name, x in named_tensors(self.module)[0].items()}
        self.changing: set[str] = set()
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._traces: OrderedDict[Any, Traced] = OrderedDict()
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "types": self.types, "changing": self.changing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def traced(
        self,
        given: Given,
        modes: Mapping[str, bool],
        types: Mapping[str, torch.dtype],
        buffers: Mapping[str, torch.Tensor],
        dropped: frozenset[Path],
        autocast: tuple[str, torch.dtype] | None,
        needed: Mapping[str, bool],
        flags: tuple[Any, ...],
    ) -> Traced:
        """The forward of a call, in these modes and types of tensors, by their names.

        Parameters
        ----------
        given : Given
        modes, types : mapping
        buffers : mapping of str to Tensor
            What the module holds, for code that asks; only those of dense sizes are looked at.
        dropped : frozenset of Path
            Parts of the output that the model does not read.
        autocast : (str, torch.dtype) or None
            The kind of device on which autocast is on, and to what type.
        needed : mapping of str to bool
            Which parameters need gradients.
        flags : tuple
            What else the forward may see of its module, hashable.

        Raises
        ------
        DepgraphError
            When the forward cannot be traced.
        """
        with self._lock, _without_global_hooks():
            grad = torch.is_grad_enabled()
            state = (*modes.items(), *types.items(), *needed.items())
            key = (given.key, grad, dropped, autocast, flags, *state)
            if key[0] is not None and key in self._traces:
                self._traces.move_to_end(key)
                return self._traces[key]
            for name, module in named_modules(self.module).items():
                module.training = modes.get(name, module.training)
            self._retype(types)
            for name, tensor in named_tensors(self.module)[0].items():
                tensor.requires_grad_(needed.get(name, tensor.requires_grad))
            with self._holding(buffers):
                made = _traced(self.module, given, grad, dropped, autocast and autocast[0])
            if key[0] is not None and not made.numbers.reads:
                self._traces[key] = made
                while len(self._traces) > _KEPT_TRACES:
                    self._traces.popitem(last=False)
            return made

    @contextmanager
    def _holding(self, buffers: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Buffers that have their values for as long as a trace takes."""
        held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for name, module in named_modules(self.module).items():
            prefix = f"{name}." if name else ""
            for key, tensor in module._buffers.items():
                live = buffers.get(prefix + key)
                if tensor is not None and live is not None and live.shape == tensor.shape:
                    held.append((module._buffers, key, tensor))
                    module._buffers[key] = live
        try:
            yield
        finally:
            for registry, key, tensor in held:
                registry[key] = tensor

    def _retype(self, types: Mapping[str, torch.dtype]) -> None:
        names = {id(tensor): name for name, tensor in named_tensors(self.module)[0].items()}
        for module in named_modules(self.module).values():
            for registry in (module._parameters, module._buffers):
                for key, tensor in registry.items():
                    dtype = None if tensor is None else types.get(names[id(tensor)])
                    if tensor is not None and dtype not in (None, tensor.dtype):
                        made = _on_meta(tensor, dtype)
                        names[id(made)] = names[id(tensor)]
                        registry[key] = made  # type: ignore[assignment]


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks on all modules (of a profiler, say) are for real calls only."""
    registries = [
        value
        for name, value in vars(nn.modules.module).items()
        if name.startswith("_global_") and name.endswith("_hooks")
    ]
    held = [registry.copy() for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, held, strict=True):
            registry.update(hooks)


def _on_meta(tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=META)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _traced(
    module: nn.Module,
    given: Given,
    grad: bool,
    dropped: frozenset[Path],
    autocast: str | None,
) -> Traced:
    example = given.example()

    def numbers(grad: bool) -> Trace:
        make = partial(ModuleRecorder, dropped=dropped, autocast=autocast, own=example.own)
        return trace_with(module, example.args, example.kwargs, make, grad)

    def raw_of(example: Example, grad: bool, symbols: Symbols | None = None) -> Trace:
        make = partial(
            RawRecorder,
            dropped=dropped,
            autocast=autocast,
            own=example.own,
            known=example.known,
            symbols=symbols,
        )
        return trace_with(module, example.args, example.kwargs, make, grad)

    def in_symbols(grad: bool) -> tuple[Trace | None, Symbols]:
        symbols = Symbols()
        try:
            with symbols.in_use():
                return raw_of(given.example(symbols), grad, symbols), symbols
        except TraceError:
            return None, symbols  # some code takes numbers only

    # with gradients and without, so as to tell where the forward turns them on or off itself
    off = numbers(False)
    raw, symbols = in_symbols(True)
    if raw is not None and _agree(off, raw):
        return Traced(off, raw, symbols)
    raw = raw_of(example, True)
    if _agree(off, raw):
        return Traced(off, raw, None)
    only = off if not grad else numbers(True)
    raw, symbols = in_symbols(grad)
    if raw is not None and _agree(only, raw):
        return Traced(only, raw, symbols, grad)
    return Traced(only, raw_of(example, grad), None, grad)


def _agree(numbers: Trace, raw: Trace) -> bool:
    """Whether two traces run the same ops on corresponding values, at the example's sizes."""
    if len(numbers.nodes) != len(raw.nodes) or len(numbers.calls) != len(raw.calls):
        return False
    place = {node: i for i, node in enumerate(numbers.nodes)}
    place.update((node, i) for i, node in enumerate(raw.nodes))

    def plain(value: Any) -> Any:
        return map_arg(value, lambda node: ("node", place[node]))

    for node, other in zip(numbers.nodes, raw.nodes, strict=True):
        if (node.op, node.target) != (other.op, other.target):
            return False
        if shape(node) != tuple(map(hint, shape(other))):
            return False
        given, same = plain((node.args, dict(node.kwargs))), plain((other.args, dict(other.kwargs)))
        pairs = zip(pytree.tree_leaves(given), pytree.tree_leaves(same), strict=False)
        if any(type(a) is not torch.device and a != hint(b) for a, b in pairs):
            return False
    return all(
        (a.name, a.start, a.end, a.depth) == (b.name, b.start, b.end, b.depth)
        for a, b in zip(numbers.calls, raw.calls, strict=True)
    )
