"""From an ``nn.Module`` to a flat ``torch.fx`` graph of ATen ops, without reading a weight.

The forward runs once on fake tensors, on a structural copy of the model: the caller's modules,
mode, hooks and caches are never touched, and a model on the ``meta`` device traces as well as one
that is loaded. Every parameter and buffer is one placeholder (tied ones share it), and every module
call is recorded with the range of nodes that it made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree

from depgraph.errors import DepgraphError


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Attributes
    ----------
    name : str
        Qualified name of the module, ``""`` for the model itself.
    start, end : int
        The nodes made during the call are ``trace.nodes[start:end]``.
    args, kwargs, output : object
        What the call took and gave back, with a ``torch.fx.Node`` in place of each traced tensor.
    depth : int
        How many recorded calls this one is nested in.
    """

    name: str
    start: int
    end: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    depth: int


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced forward: ATen nodes, their placeholders and the module calls that made them."""

    graph_module: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    tensors: dict[str, fx.Node]
    parameters: frozenset[str]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    calls: tuple[ModuleCall, ...]
    owner: dict[fx.Node, str]
    example: tuple[Any, ...]
    modes: dict[str, bool]

    @property
    def batch(self) -> int:
        """Size of the leading dimension that all inputs share, 1 where they share none."""
        sizes = {shape(node)[:1] for node in self.inputs}
        return int(sizes.pop()[0]) if len(sizes) == 1 and () not in sizes else 1


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor a node computes; empty for a scalar and for what is no tensor."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy of the module tree that shares every parameter and buffer with the original.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
        New module objects; attributes are copied, tensors that are registered are not.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Every parameter and buffer once, by its first name, and which of the names are parameters."""
    parameters = dict(model.named_parameters())
    return {**parameters, **dict(model.named_buffers())}, frozenset(parameters)


def trace_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace ``model(*args, **kwargs)`` to ATen ops.

    Parameters
    ----------
    model : nn.Module
        On any device, ``meta`` included, in either mode. It is not changed.
    args, kwargs : tuple, dict
        Tensors, real or meta, and plain values; containers of them are allowed.

    Returns
    -------
    Trace

    Raises
    ------
    DepgraphError
        When the forward raises, or branches on the values of a tensor.

    Notes
    -----
    One forward on fake tensors: time is linear in the number of ops, independent of widths.
    """
    model = structural_copy(model)
    tensors, parameters = named_tensors(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {name: _fake(mode, tensor) for name, tensor in tensors.items()}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = [_fake(mode, leaves[i]) for i in where]
    recorder = _Recorder()

    def forward(state: dict[str, Tensor], values: list[Tensor]) -> Any:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        output = torch.func.functional_call(model, state, call_args, call_kwargs)
        return [x for x in pytree.tree_leaves(_plain(output)) if isinstance(x, Tensor)]

    with recorder.watch(model), mode, torch.no_grad():
        try:
            graph_module = make_fx(forward, pre_dispatch=True)(fakes, inputs)
        except _FORWARD_ERRORS as error:
            where_text = f"in module '{recorder.current}'" if recorder.current else "in the model"
            raise DepgraphError(
                f"the forward could not be traced {where_text} ({type(model).__name__}): "
                f"{_first_line(error)}; check the example inputs, and that no branch depends on "
                "the values of a tensor"
            ) from error
    modes = {name: module.training for name, module in model.named_modules()}
    return _assemble(
        graph_module, recorder, list(fakes), parameters, len(inputs), (args, kwargs), modes
    )


_FORWARD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    # A meta tensor would make every creation op of the forward disagree about the device.
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _plain(output: Any) -> Any:
    """Dataclass-like outputs (``ModelOutput``) as plain dicts, which pytree can walk."""
    return dict(output.items()) if hasattr(output, "items") else output


class _Recorder:
    """Forward hooks on the structural copy that note each call's nodes, inputs and output."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, int, Any]] = []
        self.calls: list[ModuleCall] = []
        self.names: list[str] = []

    @property
    def current(self) -> str:
        """Name of the module that is running; after an error, of the one that failed."""
        return self.stack[-1][0] if self.stack else ""

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                module.register_forward_hook(self._leave(name), with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            values = pytree.tree_map(_proxy_node, (args, kwargs))
            self.stack.append((name, _count(), values))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _, start, (in_args, in_kwargs) = self.stack.pop()
            result = pytree.tree_map(_proxy_node, _plain(output))
            self.calls.append(
                ModuleCall(name, start, _count(), in_args, in_kwargs, result, len(self.stack))
            )
            if not self.stack:
                self.names = [node.name for node in _tracer().graph.nodes]

        return hook


def _tracer() -> Any:
    mode = get_proxy_mode()
    if mode is None:
        raise RuntimeError("a module hook ran outside of the trace")
    return mode.tracer


def _count() -> int:
    return len(_tracer().graph.nodes)


def _proxy_node(value: Any) -> Any:
    """The fx node behind a traced tensor; any other value as it is."""
    if not isinstance(value, FakeTensor):
        return value
    slot = get_proxy_slot(value, _tracer(), None)
    proxy = getattr(slot, "proxy", None)
    return proxy.node if proxy is not None else value


def _assemble(
    graph_module: fx.GraphModule,
    recorder: _Recorder,
    names: list[str],
    parameters: frozenset[str],
    num_inputs: int,
    example: tuple[Any, ...],
    modes: dict[str, bool],
) -> Trace:
    nodes = tuple(graph_module.graph.nodes)
    # The hooks saw the graph before make_fx dropped dead code and copied it; names are the same.
    by_name = {node.name: node for node in nodes}
    alive = [0, *accumulate(name in by_name for name in recorder.names)]

    def final(value: Any) -> Any:
        return pytree.tree_map_only(fx.Node, lambda node: by_name.get(node.name, node), value)

    calls = tuple(
        ModuleCall(
            call.name,
            alive[call.start],
            alive[call.end],
            final(call.args),
            final(call.kwargs),
            final(call.output),
            call.depth,
        )
        for call in recorder.calls
    )
    placeholders = [node for node in nodes if node.op == "placeholder"]
    tensors = dict(zip(names, placeholders, strict=False))
    inputs = tuple(placeholders[len(names) : len(names) + num_inputs])
    outputs = tuple(x for x in pytree.tree_leaves(nodes[-1].args) if isinstance(x, fx.Node))
    owner: dict[fx.Node, str] = {}
    for call in sorted(calls, key=lambda call: call.depth):
        owner.update((node, call.name) for node in nodes[call.start : call.end])
    return Trace(
        graph_module, nodes, tensors, parameters, inputs, outputs, calls, owner, example, modes
    )
