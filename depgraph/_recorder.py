"""Records every ATen op of a forward on meta tensors as a ``torch.fx`` node, and every module call.

Ops are seen before autograd and decompositions take them apart (``linear``, ``layer_norm`` and
``scaled_dot_product_attention`` stay whole). Blocks of a transformer are alike, so the result of an
op is remembered by its arguments' shapes: only the first of its kind is run.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from depgraph._calls import UNREAD, ModuleCall, plain
from depgraph._meta import (
    CPU,
    META,
    copied,
    creates,
    is_traced,
    look,
    meta_result,
    off_meta,
    on_meta,
    to_meta,
)
from depgraph._source import source_line

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}
"""Ops that give the program a tensor's value."""
_SMALL = 1 << 16
"""Elements of a tensor of positions or of a mask that is still worth computing."""


class _ListsAsTensors(TorchFunctionMode):
    """Makes tensors of lists used as indices, which torch would turn into ones out of sight."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                tensors = [torch.tensor(x) if isinstance(x, list) else x for x in places]
                return func(args[0], tuple(tensors))
        return func(*args, **(kwargs or {}))


class Recorder(ProxyTorchDispatchMode):
    """A graph in the making.

    Attributes
    ----------
    inputs : list of fx.Node
        Placeholders of the inputs, in order.
    constants : dict of str to Tensor
        Tensors that the forward holds without having registered them.
    calls : list of ModuleCall
        Module calls that have ended.
    """

    # torch admits only its own proxy mode to the PreDispatch key; all of its behaviour is replaced.

    def __init__(self) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
        self.constants: dict[str, Tensor] = {}
        self.calls: list[ModuleCall] = []
        self._node_of: dict[int, fx.Node] = {}
        self._made: dict[int, fx.Node] = {}
        self._known: dict[fx.Node, Tensor] = {}
        self._alive: list[Any] = []  # an id must not be given to a second tensor
        self._stand_ins: dict[int, Tensor] = {}
        self._results: dict[Any, Any] = {}
        self._stack: list[tuple[str, int, Any]] = []
        self._device = torch.device("cpu")  # where the forward thinks it runs
        self.running: Any = None  # the op that was called last

    @property
    def current(self) -> str:
        """Name of the module that is running; after an error, of the one that failed."""
        return self._stack[-1][0] if self._stack else ""

    def placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        """Node of a parameter or buffer."""
        value = on_meta(tensor)
        if not tensor.is_meta:
            self._device = tensor.device
        self._stand_ins[id(tensor)] = value
        return self._note(self.graph.placeholder(_identifier(name)), value)

    def stand_in(self, tensor: Tensor) -> Tensor:
        """Meta tensor that takes the place of a registered parameter or buffer."""
        return self._stand_ins[id(tensor)]

    def input(self, tensor: Tensor) -> Tensor:
        """Meta tensor that takes the place of an input."""
        value = on_meta(tensor)
        placeholder = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.inputs.append(self._note(placeholder, value))
        return value

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Record what runs inside, and the calls of the model's modules."""
        handles = []
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                module.register_forward_hook(self._leave(name), with_kwargs=True),
            ]
        try:
            with _ListsAsTensors(), enable_python_dispatcher(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(
        self, output: Any
    ) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], list[ModuleCall]]:
        """Outputs, all nodes and all calls, without the ops whose results nobody reads."""
        leaves = pytree.tree_leaves(plain(output))
        outputs = tuple(self._node(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        last = self.graph.output(outputs)
        alive = {last, *outputs}
        for node in reversed(self.nodes):
            if node in alive or node.op == "placeholder" or _writes(node):
                alive.add(node)
                alive.update(node.all_input_nodes)
        place = [0, *accumulate(node in alive for node in self.nodes)]
        for node in reversed(self.nodes):
            if node not in alive:
                self.graph.erase_node(node)

        def read(value: Any) -> Any:
            return UNREAD if isinstance(value, fx.Node) and value not in alive else value

        calls = [
            dataclasses.replace(
                call,
                start=place[call.start],
                end=place[call.end],
                args=pytree.tree_map(read, call.args),
                kwargs=pytree.tree_map(read, call.kwargs),
                output=pytree.tree_map(read, call.output),
            )
            for call in self.calls
        ]
        return outputs, tuple(self.graph.nodes), calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.running = func
        if not is_traced((args, kwargs)) and not creates(func):
            # on constants alone: computed for real, wherever the model thinks that it runs
            return func(*self._map(args, off_meta), **self._map_values(kwargs, off_meta))
        if func in READS and self._node(args[0]) in self._known:
            return func(self._known[self._node(args[0])])
        node_args = self._map(args, self._node)
        node_kwargs = self._map_values(kwargs, self._node)
        result = self._run(func, self._map(args, to_meta), self._map_values(kwargs, to_meta))
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        node = self.graph.call_function(func, node_args, node_kwargs)
        node.meta["source"] = source_line()
        self._note(node, result)
        if isinstance(result, Tensor):
            self._compute(node)
        if isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._note(self.graph.call_function(operator.getitem, (node, i)), item)
        return result

    def _compute(self, node: fx.Node) -> None:
        """Note the value of a small tensor that depends on no input, for branches on it.

        Positions and masks are made of sizes alone, and code looks at them.
        """
        func: Any = node.target
        known = all(operand in self._known for operand in node.all_input_nodes)
        if func._schema.is_mutable and not known:
            self._known.clear()  # something known may have been written to
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not known or random or node.meta["val"].numel() > _SMALL:
            return

        def real(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return self._known[value]
            return CPU if isinstance(value, torch.device) else value

        args = self._map(node.args, real)
        kwargs = self._map_values(dict(node.kwargs), real)
        self._known[node] = func(*args, **kwargs)

    def _map_values(self, kwargs: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
        return {name: self._map(value, function) for name, value in kwargs.items()}

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The op's result, or a copy of what it gave for arguments that look the same."""
        if creates(func):
            kwargs = {**kwargs, "device": META}
        if func._schema.is_mutable:
            with torch._C._DisablePythonDispatcher():
                return func(*args, **kwargs)
        key = (func, look((args, tuple(kwargs.items()))))
        if key not in self._results:
            self._results[key] = meta_result(func, args, kwargs)
            return self._results[key]
        return copied(self._results[key])

    def _map(self, value: Any, function: Callable[[Any], Any]) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._map(item, function) for item in value)
        return function(value)

    def _node(self, value: Any) -> Any:
        """The node that made a tensor; any other value as it is."""
        if not isinstance(value, Tensor):
            return self._device if value == META else value
        if id(value) not in self._node_of and value.is_meta:
            self._node_of[id(value)] = self._made[value.untyped_storage()._cdata]
            self._alive.append(value)
        elif id(value) not in self._node_of:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            self._known[self._note(self.graph.get_attr(name), value)] = value
        return self._node_of[id(value)]

    def _note(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        self._alive.append(value)
        self.nodes.append(node)
        if isinstance(value, Tensor):
            self._node_of[id(value)] = node
            # functions that make tensors hand out another object on the same storage
            self._made.setdefault(value.untyped_storage()._cdata, node)
        return node

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            values = pytree.tree_map(self._traced, (args, kwargs))
            self._stack.append((name, len(self.nodes), values))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _, start, (in_args, in_kwargs) = self._stack.pop()
            result = pytree.tree_map(self._traced, plain(output))
            end, depth = len(self.nodes), len(self._stack)
            special = plain(output) is not output and type(output) is not dict
            cls = type(output) if special else None
            self.calls.append(ModuleCall(name, start, end, in_args, in_kwargs, result, depth, cls))

        return hook

    def _traced(self, value: Any) -> Any:
        known = isinstance(value, Tensor) and (value.is_meta or id(value) in self._node_of)
        return self._node(value) if known else value


def _identifier(name: str) -> str:
    return re.sub(r"\W|^(?=\d)", "_", name)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
