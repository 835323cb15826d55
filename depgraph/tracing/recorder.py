"""Records every ATen op of a forward on meta tensors as a ``torch.fx`` node, and every module call.

Ops are seen before autograd and decompositions take them apart (``linear``, ``layer_norm`` and
``scaled_dot_product_attention`` stay whole). Blocks of a transformer are alike: a call that must
run the ops of an earlier one (`tracing.alike`) is repeated without its forward, and the result of
any other op is remembered by its arguments' shapes.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils import _pytree as pytree

from depgraph.tracing.blocks import mapped
from depgraph.tracing.calls import ModuleCall, classes_in, plain
from depgraph.tracing.deciding import note_value_read
from depgraph.tracing.meta import (
    CPU,
    META,
    copied,
    copied_unseen,
    creates,
    is_traced,
    known_results,
    look,
    meta_result,
    off_meta,
    on_meta,
    to_meta,
)
from depgraph.tracing.modules import named_modules
from depgraph.tracing.nodes import NodeMaker, needs_gradients
from depgraph.tracing.objects import keeps_state, opened
from depgraph.tracing.repeats import Repeats
from depgraph.tracing.shapes import quick_write
from depgraph.tracing.source import source_line, source_stack
from depgraph.tracing.unread import Unread, alive_nodes, with_unread, without_unread
from depgraph.tracing.values import (
    Read,
    Values,
    decides_by_values,
    deciding,
    reads_values,
    tells_how,
    tells_truth,
)
from depgraph.tracing.watch import can_be_watched, plain_call, thought_on, watched

_NONE: Mapping[Any, bool] = {}
_NO_TURNS: Mapping[Any, int] = {}
_HINTS = {torch.ops.aten.repeat_interleave.self_int: "output_size"}
"""Arguments that only repeat what follows from the others, and that a cut would make wrong."""


_SLICE = torch.ops.aten.slice.Tensor


class UnknownValue(RuntimeError):
    """The forward asks for a value that differs from call to call."""


class UnknownTruth(UnknownValue):
    """The same, of something that is true or false.

    Attributes
    ----------
    where : object
        Which code asked.
    """

    def __init__(self, where: Any) -> None:
        super().__init__()
        self.where = where


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
    values : Values
        What tensors hold, where the forward asks.
    reads : list of Read
        What the forward asked for, of what its caller may change.
    read_from : list of frozenset of fx.Node
        All nodes that each value follows from that the forward has asked for.
    node_of : dict of int to fx.Node
        What made each tensor, by its identity.
    written : list of (Tensor, fx.Node, fx.Node)
        Tensors that an op gave back as its result, the node that they were from and the new one.
    unread : Unread or None
        After the end: the forward with the ops whose results nobody reads, where there are some.
    """

    can_repeat = True
    """Whether a call that is alike an earlier one may be recorded without its forward."""
    looks_up = False
    """Whether what follows from an unregistered tensor is computed at each call, or here."""
    encloses_hooks = False
    """Whether what a module's hooks do is part of its call."""

    # torch admits only its own proxy mode to the PreDispatch key; all of its behaviour is replaced.

    def __init__(
        self, answers: Mapping[Any, bool] = _NONE, turned: Mapping[Any, int] = _NO_TURNS
    ) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self.make = NodeMaker()
        self.graph = self.make.graph
        self.nodes: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
        self.held: dict[str, tuple[Any, ...]] = {}  # where modules hold constants
        self.looked_up: frozenset[int] = frozenset()
        self.constants: dict[str, Tensor] = {}
        self.calls: list[ModuleCall] = []
        self.node_of: dict[int, fx.Node] = {}
        self._made: dict[int, fx.Node] = {}
        self.values = Values(self.nodes, self.number)
        self.reads: list[Read] = []
        self.assumed: set[fx.Node] = set()  # of which values that cannot be known say the shape
        self.read_from: list[frozenset[fx.Node]] = []
        self._answers = answers  # to what cannot be known, by where it is asked
        self._turned = dict(turned)  # how often to say the reverse of what is known, by where
        self.below: FrameType | None = None  # which frame calls the model
        self._alive: list[Any] = []  # an id must not be given to a second tensor
        self._stand_ins: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}
        self._results = known_results()
        self.stack: list[tuple[str, int, Any, bool, Any]] = []
        self.repeats: Repeats | None = None
        self.written: list[tuple[Tensor, fx.Node, fx.Node]] = []
        self._device = torch.device("cpu")  # where the forward thinks it runs
        self.mode_readers: set[str] = set()  # modules that ran when some module's mode was read
        self.modes_read: set[tuple[str, str]] = set()  # the module that ran, and whose mode it was
        self.stored: Any = None  # what changed attributes of the model held, and hold now
        self.hooked: dict[str, str] = {}  # modules of which a hook does not run that may act
        self.gradients_read = False  # whether the forward asked what needs gradients
        self.running: Any = None  # the op that was called last
        self.unread: Unread | None = None

    def number(self, value: Any) -> Any:
        """A number or size as an op that runs for real takes it."""
        return value

    @property
    def current(self) -> str:
        """Name of the module that is running; after an error, of the one that failed."""
        return self.stack[-1][0] if self.stack else ""

    def placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        """Node of a parameter or buffer."""
        value = on_meta(tensor)
        if not tensor.is_meta:
            self._device = tensor.device
        self._stand_ins[id(tensor)] = value
        node = self._note(self.make.placeholder(name), value)
        if not isinstance(tensor, nn.Parameter):
            self.values.know(node, tensor)
        return node

    def stand_in(self, tensor: Tensor) -> Tensor:
        """Meta tensor that takes the place of a registered parameter or buffer."""
        return self._stand_ins[id(tensor)]

    def input(self, tensor: Tensor) -> Tensor:
        """Meta tensor that takes the place of an input, one for each tensor."""
        if id(tensor) in self._given:
            return self._given[id(tensor)]
        value = self._given[id(tensor)] = on_meta(tensor)
        placeholder = self.make.placeholder(f"input_{len(self.inputs)}")
        self.inputs.append(self._note(placeholder, value))
        placeholder.meta["gradients"] = (tensor.requires_grad, tensor.is_leaf)
        if tells_how(tensor):
            self.values.know(placeholder, tensor)
        return value

    @contextmanager
    def watch(self, model: nn.Module, alike: bool = True) -> Iterator[None]:
        """Record what runs inside, and the calls of the model's modules.

        Calls that are alike may be repeated without their forwards.
        """
        modules = named_modules(model)
        by_hooks = {
            name: module
            for name, module in modules.items()
            if not can_be_watched(module, self.encloses_hooks)
        }
        rest = {name: module for name, module in modules.items() if name not in by_hooks}
        if by_hooks:
            self.mode_readers.add("")  # what these read is not seen: anything may have
        with ExitStack() as stack:
            for name, module in by_hooks.items():
                enter, leave = self._hooks(name)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)
                handle = module.register_forward_hook(leave, with_kwargs=True)
                stack.callback(handle.remove)
            self.repeats = Repeats(self, model, modules) if alike else None
            stack.enter_context(watched(self.repeats or self, rest))
            stack.enter_context(thought_on(self._device, self.gradients))
            stack.enter_context(enable_python_dispatcher())
            stack.enter_context(self)
            yield

    def gradients(self, tensor: Tensor) -> tuple[bool, bool] | None:
        """Whether a tensor of the trace would need gradients, and whether it would be a leaf."""
        if not tensor.is_meta:
            return None
        self.gradients_read = True
        node = self.node(tensor)
        if "gradients" in node.meta:
            return node.meta["gradients"]
        wanted = tensor.requires_grad or needs_gradients(node)
        return wanted, node.op == "placeholder" or not wanted

    def call(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record a call of a module."""
        self.entered(name, args, kwargs)
        output = plain_call(module, args, kwargs)
        self.left(output)
        return output

    def changed(self) -> None:
        """An attribute of a module was set, which matters to nothing here."""

    def mode_read(self, name: str) -> None:
        """The module that is running asked for the mode of one."""
        self.mode_readers.add(self.current)
        self.modes_read.add((self.current, name))

    def finish(
        self, output: Any
    ) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], list[ModuleCall]]:
        """Outputs, all nodes and all calls, without the ops whose results nobody reads."""
        leaves = self.results(output)
        outputs = tuple(self.node(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        last = self.graph.output(outputs)
        reads = (read.node for read in self.reads)
        alive = alive_nodes(self.nodes, (last, *outputs, *reads, *self.left_behind()))
        if len(alive) == len(self.nodes) + 1:
            return outputs, (*self.nodes, last), self.calls
        calls = without_unread(self.calls, self.nodes, alive)
        self.unread = self.with_unread()
        for node in reversed(self.nodes):
            if node not in alive:
                self.graph.erase_node(node)
        return outputs, tuple(self.graph.nodes), calls

    def results(self, output: Any) -> list[Any]:
        """What of an output is read."""
        return pytree.tree_leaves(plain(output))

    def begin(self, model: nn.Module) -> None:
        """The model is about to be called."""

    def end(self, model: nn.Module) -> None:
        """The model has been called."""

    def left_behind(self) -> list[fx.Node]:
        """What else stays of the forward, in objects that it was given."""
        return []

    def with_unread(self) -> Unread | None:
        """The forward with the ops whose results nobody reads."""
        return with_unread(self.nodes, self.calls)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch should keep its compiler off, call by call; nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.running = func
        if func is _SLICE and not kwargs and self._is_all(*args):
            return args[0]  # torch itself leaves it out now and then, as of ``y[:, :k]`` the first
        if not is_traced((args, kwargs)) and not creates(func) and not self._is_held(args):
            # on constants alone: computed for real, wherever the model thinks that it runs
            if reads_values(func):
                note_value_read()
            return func(*self._map(args, off_meta), **self._map_values(kwargs, off_meta))
        if reads_values(func):
            return self._answer(func, args, kwargs)
        node_args = self._map(args, self.node)
        node_kwargs = self._map_values(kwargs, self.node)
        node_kwargs.pop(_HINTS.get(func, ""), None)
        if torch.Tag.inplace_view in func.tags:
            self._keep_shapes(args[0])
        result, assumed = self._result(func, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        node = self.make.call(func, node_args, node_kwargs)
        node.meta["source"] = source_line()
        node.meta["grad"] = torch.is_grad_enabled()
        self._note(node, result)
        if assumed:
            self.assumed.add(node)
            self.read_from.append(frozenset(self.inputs))
        if assumed or not self.values.unsure.isdisjoint(node.all_input_nodes):
            self.values.unsure.add(node)
        if func._schema.is_mutable:
            self.values.wrote()
        if isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._note(self.make.call(operator.getitem, (node, i)), item)
        return result

    def _keep_shapes(self, tensor: Tensor) -> None:
        """Nodes made this tensor in the shape that it is about to lose."""
        for node in self.nodes:
            if node.meta["val"] is tensor:
                node.meta["val"] = copied_unseen(tensor)
        self._results.clear()  # a result that is remembered may be this very tensor

    def _is_held(self, args: Any) -> bool:
        """Whether a tensor is among the arguments that a module has in an attribute."""
        return bool(self.looked_up) and any(
            id(leaf) in self.looked_up for leaf in pytree.tree_leaves(args)
        )

    def _is_all(
        self, tensor: Tensor, dim: int = 0, start: Any = 0, end: Any = None, step: int = 1
    ) -> bool:
        """Whether a slice takes all there is."""
        ends = (None, sys.maxsize, self.number(tensor.size(dim)))
        if step != 1 or self.number(start) not in (None, 0) or self.number(end) not in ends:
            return False
        # of sizes that are symbols a guard says so, too
        return not start and (self.number(end) in ends[:2] or bool(end == tensor.size(dim)))

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an op that reads a tensor gives."""
        found = [self._value(x) for x in args if isinstance(x, Tensor)]
        if None not in found:
            values = iter(found)
            answer = func(*(next(values) if isinstance(x, Tensor) else x for x in args), **kwargs)
            where = source_stack(self.below) if tells_truth(func, args) else ()
            if self._turned.get(where):
                self._turned[where] -= 1
                answer = not answer
            for tensor in args:
                self._note_read(tensor, answer, where)
            return answer
        if not tells_truth(func, args):
            raise UnknownValue(f"{func} asks for a value that is not known")
        where = source_stack(self.below)
        if where not in self._answers:
            raise UnknownTruth(where)
        self.read_from.append(frozenset(self.inputs))
        return self._answers[where]

    def value_of(self, tensor: Tensor) -> Tensor:
        """What a tensor of the trace holds, for the forward to go on with.

        Raises
        ------
        UnknownValue
        """
        value = self._value(tensor)
        if value is None:
            raise UnknownValue
        self._note_read(tensor, value)
        return value

    def _value(self, tensor: Tensor) -> Tensor | None:
        if not tensor.is_meta:
            return tensor
        found = self.values.of(self.node(tensor))
        return None if found is None else found[0]

    def _note_read(self, tensor: Any, answer: Any, where: tuple[str, ...] = ()) -> None:
        found = self.values.of(self.node(tensor)) if isinstance(tensor, Tensor) else None
        if found is None or not tensor.is_meta:
            return
        self.read_from.append(found[1])
        given = [node for node in found[1] if node.op == "placeholder"]
        if not given:
            note_value_read()
        else:
            inputs = frozenset(given).intersection(self.inputs)
            buffers = frozenset(given).difference(inputs)
            node, line = self.node(tensor), source_line()
            self.reads.append(Read(node, answer, self.current, line, inputs, buffers, where))

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """What an op gives on meta, and whether its shape had to be assumed.

        A shape that follows from values is computed from these where they are known. Else all are
        taken to be picked: how many are is no dimension that could be cut.
        """
        try:
            on_shapes = (self._map(args, to_meta), self._map_values(kwargs, to_meta))
            return self._run(func, *on_shapes), False
        except (RuntimeError, NotImplementedError):
            if not decides_by_values(func):
                raise
        decisive = deciding(func, args, kwargs)
        assumed = any(self._value(x) is None for x in decisive)
        for tensor in () if assumed else decisive:
            self._note_read(tensor, self._value(tensor))
        if assumed and func._opname == "nms":
            return args[0].new_empty(len(args[0]), dtype=torch.long), True

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                known = self._value(value)
                return torch.ones_like(value, device=CPU) if known is None else known
            return CPU if isinstance(value, torch.device) else value

        result = func(*self._map(args, real), **self._map_values(kwargs, real))
        return mapped(result, to_meta), assumed

    def _map_values(self, kwargs: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
        return {name: self._map(value, function) for name, value in kwargs.items()}

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The op's result, or a copy of what it gave for arguments that look the same."""
        if creates(func):
            kwargs = {**kwargs, "device": META}
        if func._schema.is_mutable:
            if quick_write(func, args, kwargs):
                return args[0]
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

    def node(self, value: Any) -> Any:
        """The node that made a tensor; any other value as it is."""
        if not isinstance(value, Tensor):
            return self._device if value == META else value
        if id(value) not in self.node_of and value.is_meta:
            if value.untyped_storage()._cdata not in self._made:
                raise RuntimeError(
                    "it uses a tensor that was made out of sight of the trace, such as that of a "
                    "cache from an earlier call: trace the model without one (use_cache=False)"
                )
            self.node_of[id(value)] = self._made[value.untyped_storage()._cdata]
            self._alive.append(value)
        elif id(value) not in self.node_of:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            self.values.know(self._note(self.make.get_attr(name), value), value)
        return self.node_of[id(value)]

    def _note(self, node: fx.Node, value: Any) -> fx.Node:
        self.nodes.append(node)
        self.put(node, value)
        return node

    def put(self, node: fx.Node, value: Any) -> None:
        """Note what a node makes."""
        node.meta["val"] = value
        self._alive.append(value)
        if isinstance(value, Tensor):
            was = self.node_of.get(id(value))
            if was is not None:
                self.written.append((value, was, node))
            self.node_of[id(value)] = node
            # functions that make tensors hand out another object on the same storage
            self._made.setdefault(value.untyped_storage()._cdata, node)

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """For a module that has hooks of its own, between which its forward runs."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.entered(name, args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.left(output)

        return enter, leave

    def entered(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Note a call that begins."""
        given = mapped((args, kwargs), self.traced)
        objects = None
        if any(map(keeps_state, pytree.tree_leaves(given))):
            objects = args, kwargs
            given = mapped(opened(objects), self.traced)
        self.stack.append((name, len(self.nodes), given, torch.is_grad_enabled(), objects))

    def left(self, output: Any) -> None:
        """Note the call that has ended."""
        name, start, (args, kwargs), grad, objects = self.stack.pop()
        result = mapped(plain(output), self.traced)
        end, depth, classes = len(self.nodes), len(self.stack), classes_in(output)
        # tensors without a node yet are constants, which get theirs after the call's own
        after = None if objects is None else mapped(opened(objects), self._in_object)
        self.calls.append(
            ModuleCall(name, start, end, args, kwargs, result, depth, classes, grad, after)
        )

    def _in_object(self, value: Any) -> Any:
        return self.node(value) if isinstance(value, Tensor) else value

    def traced(self, value: Any) -> Any:
        known = isinstance(value, Tensor) and (value.is_meta or id(value) in self.node_of)
        return self.node(value) if known else value
