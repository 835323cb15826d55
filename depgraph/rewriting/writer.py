"""Turns a traced call of a module into a graph with the sizes of a plan."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, partial
from operator import floordiv, getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from depgraph.coupling.axes import Atom, Axis, axis_atoms, axis_size, kept_sizes
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.convolve import group_axis
from depgraph.errors import DepgraphError
from depgraph.rewriting.changes import Changes
from depgraph.rewriting.given import OWN, Attribute, Given, Path, Symbol, key_of
from depgraph.rewriting.literals import (
    COUNTS,
    GROUPED,
    PARTING,
    RANGES,
    SIZE_ARGUMENTS,
    kept_range,
    literal_axes,
    spelled_sizes,
)
from depgraph.rewriting.skeleton import Traced
from depgraph.rewriting.symbols import SYMBOLIC, divides, pin
from depgraph.tracing.calls import ModuleCall, Unread, is_named_tuple
from depgraph.tracing.calls import Path as OutputPath
from depgraph.tracing.meta import META
from depgraph.tracing.objects import Opened, keeps_state, objects_in


class Writer:
    """Writes one forward: from a module's trace, with child calls and free sizes.

    Parameters
    ----------
    where : str
        The module, for people.
    signature : inspect.Signature
    traced : Traced
    p : Propagation
        Of the numbers.
    kept : mapping of Atom to LongTensor
    given : Given
    cls : type
        Holds the constants of the forward.
    number : int
        Of the forward, among those of the class.
    present : collection of str
        Names of the modules within it that the sliced model has.
    inlined : collection of str
        Modules within it whose own forwards may not fit the plan.
    """

    def __init__(
        self,
        where: str,
        signature: inspect.Signature,
        traced: Traced,
        p: Propagation,
        kept: Mapping[Atom, Tensor],
        given: Given,
        cls: type[nn.Module],
        number: int,
        present: Collection[str],
        inlined: Collection[str],
    ) -> None:
        self._where = where
        self._signature = signature
        self._trace = traced.numbers
        self._raw = traced.raw
        self._number_of = dict(zip(traced.raw.nodes, traced.numbers.nodes, strict=True))
        self._symbols = traced.symbols
        self._stored = traced.raw.stored
        self._caller = traced.grad
        self._call: ModuleCall = traced.raw.calls_of[""][-1]
        self._p = p
        self._kept = kept
        self._sizes = kept_sizes(kept)
        self._given = given
        self._cls = cls
        self._number = number
        self._present = present
        self._inlined = inlined
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}  # by raw node
        self._places: dict[Path, fx.Node] = {}
        self._expressions: dict[Any, Any] = {}
        self._names = {node: name for name, node in traced.raw.tensors.items()}
        self._grad: bool | None = None  # as the caller has it
        self._objects = Changes(where, self._graph, self._mapped)

    def write(self) -> fx.Graph:
        """The graph; a guard may have been added to the symbols."""
        self._placeholders()
        index, children = self._call.start, self._raw.calls_at
        while index < self._call.end:
            self._passing(index)
            child = children.get((self._call.depth + 1, index))
            if child is not None and child.name not in self._inlined:
                self._child(child)
                index = child.end
            else:
                self._op(self._raw.nodes[index])
                index += 1
        self._passing(index)
        self._objects.bring(self._call.after)
        self._objects.bring(self._stored and self._stored[1])
        output = self._rebuilt(self._call.output)
        self._set_gradients(None)
        self._graph.output(output)
        return self._graph

    def _placeholders(self) -> None:
        for name, parameter in self._signature.parameters.items():
            default = parameter.default
            extra = {} if default is parameter.empty else {"default_value": default}
            star = str(parameter).partition(name)[0]  # "", "*" or "**"
            self._places[(name,)] = self._graph.placeholder(star + name, **extra)
        for raw, given in zip(self._raw.inputs, self._given.tensors.values(), strict=True):
            self._made[raw] = self._place(given.places[0])
        bound = self._signature.bind(*self._call.args, **self._call.kwargs)
        for path, opened in objects_in(dict(bound.arguments)).values():
            self._objects.given(opened, partial(self._place, tuple(map(key_of, path))))
        for before in objects_in(self._stored[0]).values() if self._stored else ():
            path = (OWN, *map(key_of, before[0]))
            self._objects.given(before[1], partial(self._place, path))
        if self.switches_gradients:
            self._asked = self._graph.call_function(torch.is_grad_enabled)

    def _place(self, path: Path) -> fx.Node:
        """An argument, or what it holds at some place."""
        if path == (OWN,):
            self._places[path] = self._graph.get_attr("depgraph_self")
        if path not in self._places:
            source, key = self._place(path[:-1]), path[-1]
            named = isinstance(key, Attribute)
            part = (getattr, (source, str(key))) if named else (getitem, (source, key))
            self._places[path] = self._graph.call_function(*part)
        return self._places[path]

    def _symbol(self, number: int) -> fx.Node:
        """What the inputs say that a symbol is."""
        key = ("symbol", number)
        if key not in self._expressions:
            self._expressions[key] = self._asked_of_inputs(number)
        node: fx.Node = self._expressions[key]
        return node

    def _asked_of_inputs(self, number: int) -> fx.Node:
        for path, symbol in self._given.numbers.items():
            if symbol.number == number:
                return self._place(path)
        for given in self._given.tensors.values():
            for dim, found in enumerate(given.dims):
                if isinstance(found, Symbol) and found.number == number:
                    size = self._graph.call_method("size", (self._place(given.places[0]), dim))
                    if found.kept == 1:
                        return size
                    return self._graph.call_function(floordiv, (size, found.kept))
        raise KeyError(number)

    @cached_property
    def switches_gradients(self) -> bool:
        """Whether the forward turns gradients on or off within itself."""
        return any(self._forced(node) is not None for node in self._raw.nodes) or any(
            self._forced_call(call) is not None for call in self._raw.calls
        )

    def _forced(self, raw: fx.Node) -> bool | None:
        """What the forward sets gradients to at an op, whatever the caller has them be."""
        if "grad" not in raw.meta:
            return self._grad
        return self._other(raw.meta["grad"], self._number_of[raw].meta["grad"])

    def _forced_call(self, call: ModuleCall) -> bool | None:
        place = next(i for i, other in enumerate(self._raw.calls) if other is call)
        return self._other(call.grad, self._trace.calls[place].grad)

    def _other(self, raw: bool, numbers: bool) -> bool | None:
        """What gradients are set to; None where they are as the caller has them."""
        if self._caller is not None:
            return None if raw is self._caller else raw
        return None if (raw, numbers) == (True, False) else raw

    def _set_gradients(self, wanted: bool | None) -> None:
        if wanted is not self._grad:
            self._grad = wanted
            value = self._asked if wanted is None else wanted
            self._graph.call_function(torch._C._set_grad_enabled, (value,))

    def _rebuilt(self, output: Any, path: OutputPath = ()) -> Any:
        """An output with what the module made of its parts, at any depth."""
        if not self._call.output_classes or not isinstance(output, (tuple, list, dict)):
            return self._mapped(output)
        if not isinstance(output, dict):
            return type(output)(self._rebuilt(x, (*path, i)) for i, x in enumerate(output))
        fields = {key: self._rebuilt(value, (*path, key)) for key, value in output.items()}
        cls = self._call.output_classes.get(path)
        if cls is None:
            return fields
        return self._graph.call_function(_maker(cls, self._where), (fields,))

    def _child(self, child: ModuleCall) -> None:
        self._set_gradients(self._forced_call(child))
        self._objects.bring((child.args, child.kwargs))
        result = self._called_child(child)
        self._take(result, child.output, child.output_classes)
        inside = set(self._raw.nodes[child.start : child.end])
        for node, found in self._objects.left(child):
            if node in inside and node not in self._made and not inside.issuperset(node.users):
                self._made[node] = found()

    def _called_child(self, child: ModuleCall) -> fx.Node:
        args, kwargs = self._mapped(child.args), self._mapped(child.kwargs)
        # named by hand: a child called "self" would shadow the module in the generated code
        return self._graph.create_node("call_module", child.name, args, kwargs, name="child")

    def _passing(self, index: int) -> None:
        """Call the children that computed nothing of what is read, for hooks that they may have."""
        for child in self._idle.get(index, ()):
            self._set_gradients(self._forced_call(child))
            result = self._called_child(child)
            if not any(isinstance(x, Unread) for x in pytree.tree_leaves(child.output)):
                what = f"'{child.name}' of a {self._cls.__name__}"
                passed = (result, self._mapped(child.output), what)
                self._graph.call_function(passed_on, passed)

    @cached_property
    def _idle(self) -> dict[int, list[ModuleCall]]:
        """Children without ops of their own, by their place."""
        found: dict[int, list[ModuleCall]] = {}
        for call in self._raw.calls:
            idle = call.start == call.end and call.depth == self._call.depth + 1
            if idle and call.name in self._present:
                found.setdefault(call.start, []).append(call)
        return found

    def _take(
        self,
        result: fx.Node,
        output: Any,
        classes: Mapping[OutputPath, type],
        path: OutputPath = (),
    ) -> None:
        """The tensors in what a child returned, which may be a container of them."""
        if isinstance(output, fx.Node):
            self._made[output] = result
        elif isinstance(output, (tuple, list, dict)):
            items = output.items() if isinstance(output, dict) else enumerate(output)
            part = getitem if issubclass(classes.get(path, dict), dict) else getattr
            for key, item in items:
                if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(item)):
                    own = self._graph.call_function(part, (result, key))
                    self._take(own, item, classes, (*path, key))

    def _op(self, raw: fx.Node) -> None:
        if raw.op != "call_function":
            return  # a constant, written where it is read
        self._set_gradients(self._forced(raw))
        node, target = self._number_of[raw], raw.target
        args, kwargs = self._mapped(raw.args), dict(self._mapped(raw.kwargs))
        name = op_name(node)
        if name in SIZE_ARGUMENTS or name in COUNTS:
            args, kwargs = self._with_sizes(raw, args, kwargs)
        if name in GROUPED:
            args, kwargs = self._with_groups(raw, GROUPED[name], args, kwargs)
        if name == "aten.scaled_dot_product_attention":
            kwargs.update(self._scale(node))
        if name in PARTING and self._is_cut(literal_axes(self._p, node)):
            target, args, kwargs = self._with_parts(raw)
        if name in RANGES:
            target, args, kwargs = self._with_range(raw, target, args, kwargs)
        self._made[raw] = self._called(target, args, kwargs)

    def _called(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A call of an op; one with open sizes as Python code calls it.

        What ``torch.ops`` is given ``torch.jit.trace`` takes for constants.
        """
        name, numbers = getattr(target, "_opname", ""), set(self._expressions.values())
        if numbers.isdisjoint(_nodes((args, kwargs))):
            return self._graph.call_function(target, args, kwargs)
        if name == "slice" and not kwargs:
            source, dim, *bounds = args
            lead = (slice(None),) * dim if dim >= 0 else (Ellipsis,)
            where = (*lead, slice(*bounds), *(slice(None),) * (-1 - dim))
            return self._graph.call_function(getitem, (source, where))
        first = target._schema.arguments[0]
        if (first.name, str(first.type)) == ("self", "Tensor") and hasattr(Tensor, name):
            kwargs = {key: value for key, value in kwargs.items() if key != "implicit"}
            return self._graph.call_method(name, args, kwargs)
        named = getattr(torch, name, None) or getattr(torch._C._nn, name, None)
        return self._graph.call_function(named or target, args, kwargs)

    def _device(self) -> fx.Node:
        """Where the module's inputs are, wherever it was traced."""
        found = next(iter(self._made.values()), None)
        if found is None:
            found = self._node(next(iter(self._names)))
        return self._graph.call_function(getattr, (found, "device"))

    def _is_cut(self, axes: Iterable[Axis]) -> bool:
        return any(atom in self._kept for axis in axes for atom in axis_atoms(axis))

    def _size(self, axis: Axis, value: Any) -> Any:
        """The size of an axis in the pruned model, whose size in the dense one is a value."""
        cut = tuple(factor for factor in axis if self._is_cut([(factor,)]))
        if not cut:
            return self._mapped_leaf(value)
        whole, left = axis_size(cut), axis_size(cut, self._sizes)
        if isinstance(value, torch.SymInt):
            if divides(value, whole):
                return self._mapped_leaf(value // whole * left)
            pin(value)
        return axis_size(axis, self._sizes)

    def _with_parts(self, raw: fx.Node) -> tuple[Any, Any, dict[str, Any]]:
        """Any way of parting a dimension, as parts of stated sizes."""
        a, dim = arguments(raw), arguments(self._number_of[raw])["dim"]
        parts = zip(
            literal_axes(self._p, self._number_of[raw]),
            (part.shape[dim] for part in raw.meta["val"]),
            strict=True,
        )
        sizes = [self._size(axis, size) for axis, size in parts]
        split = torch.ops.aten.split_with_sizes.default
        return split, (self._node(a["self"]), sizes, dim), {}

    def _with_range(
        self, raw: fx.Node, target: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """A range of a pruned dimension: what is kept before its start, and before its end."""
        node = self._number_of[raw]
        a = arguments(node)
        if not self._is_cut([self._p.axes(a["self"])[a["dim"]]]):
            return target, args, kwargs
        for value in arguments(raw).values():
            pin(value)
        part = torch.ops.aten.slice.Tensor
        source = self._node(arguments(raw)["self"])
        return part, (source, a["dim"], *kept_range(self._p, node, self._kept)), {}

    def _scale(self, node: fx.Node) -> dict[str, float]:
        """The temperature of the original width, where the op would take that of the new one."""
        a = arguments(node)
        axis = self._p.axes(a["query"])[-1]
        if a["scale"] is not None or axis_size(axis, self._sizes) == axis_size(axis):
            return {}
        return {"scale": axis_size(axis) ** -0.5}

    def _with_sizes(
        self, raw: fx.Node, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        node = self._number_of[raw]
        sizes = spelled_sizes(self._p, node)
        if not self._is_cut(axis for axis, _ in sizes):
            return args, kwargs
        name = op_name(node)
        argument = {**SIZE_ARGUMENTS, **COUNTS}[name]
        given = arguments(raw)[argument]
        several = isinstance(given, (list, tuple))
        values = list(given) if several else [given]
        # where nothing is left, torch cannot tell what an open size would be
        if not all(axis_size(axis, self._sizes) for axis in self._p.axes(node)):
            made = raw.meta["val"].shape
            first = arguments(node)["dim"] if name == "aten.unflatten" else len(made) - len(values)
            open_ = name in SIZE_ARGUMENTS
            values = [
                made[first + i] if open_ and _is_open(value) else value
                for i, value in enumerate(values)
            ]
        new = [
            value if _is_open(value) else self._size(axis, value)
            for (axis, _), value in zip(sizes, values, strict=True)
        ]
        return _with_argument(node, argument, new if several else new[0], args, kwargs)

    def _with_groups(
        self, raw: fx.Node, argument: str, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        node = self._number_of[raw]
        axis = group_axis(self._p, node)
        if not self._is_cut([axis]):
            return args, kwargs
        groups = self._size(axis, arguments(raw)[argument])
        return _with_argument(node, argument, groups, args, kwargs)

    def _mapped(self, value: Any) -> Any:
        """Arguments in terms of the new graph."""
        return map_aggregate(value, self._mapped_leaf)

    def _mapped_leaf(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, SYMBOLIC):
            return self._expression(value)
        if isinstance(value, torch.device):
            return self._device() if value == META else value
        if isinstance(value, torch.Generator):
            raise DepgraphError(
                f"{self._where} draws from a torch.Generator, which its forward cannot do once it "
                "is rewritten; put what draws into a module of its own, or leave whole what it "
                "needs a rewritten forward for"
            )
        if isinstance(value, Unread):
            return None
        if isinstance(value, Opened):
            return self._objects.node(value.source)
        if keeps_state(value):
            return self._objects.node(value)
        # containers that only pytree knows, such as a library's outputs
        return value if pytree.tree_is_leaf(value) else pytree.tree_map(self._mapped_leaf, value)

    def _expression(self, value: Any) -> Any:
        if self._symbols is None:
            raise TypeError(f"a symbol without symbols: {value}")
        key = value.node.expr
        if key not in self._expressions:
            self._expressions[key] = self._symbols.written(value, self._graph, self._symbol)
        return self._expressions[key]

    def _node(self, raw: fx.Node) -> fx.Node:
        if raw not in self._made:
            self._made[raw] = self._held(raw)
        return self._made[raw]

    def _held(self, raw: fx.Node) -> fx.Node:
        """What the module holds: a parameter, a buffer, or a tensor that it has not registered."""
        if raw in self._names:
            return self._graph.get_attr(self._names[raw])
        if raw.op != "get_attr":
            raise DepgraphError(
                f"{self._where} uses '{raw.name}', which one of its children computes but "
                "does not return; its forward cannot be rewritten"
            )
        name = str(raw.target)
        if name not in self._raw.held:
            attribute = f"depgraph_{name}_{self._number}"
            setattr(self._cls, attribute, self._raw.constants[name])
            return self._graph.get_attr(attribute)
        module, attribute, *places = self._raw.held[name]
        node = self._graph.get_attr(f"{module}.{attribute}" if module else attribute)
        for key in places:
            node = self._graph.call_function(getitem, (node, key))
        return node


def _nodes(value: Any) -> list[fx.Node]:
    """All nodes within arguments, in order."""
    found: list[fx.Node] = []
    map_arg(value, found.append)
    return found


def passed_on(result: Any, expected: Any, where: str) -> None:
    """Refuse to go on where a module that computes nothing gave something else.

    Raises
    ------
    DepgraphError
        What it gives is not told from what it takes in a rewritten forward.
    """
    if isinstance(expected, (list, tuple)) and type(result) is type(expected):
        for pair in zip(result, expected, strict=True):
            passed_on(*pair, where)
    elif isinstance(expected, Tensor) and result is not expected:
        raise DepgraphError(
            f"{where} gave back what it took when the model was traced, and gives something else "
            "now, as a hook may do; register the hook before, and prune again"
        )


def _is_open(size: Any) -> bool:
    """Whether a size is left for torch to tell; asked without a guard."""
    return isinstance(size, int) and size == -1


def _maker(cls: type, where: str) -> Callable[[dict[str, Any]], Any]:
    """Makes a dataclass, named tuple or dict of these fields, as the module did."""
    if dataclasses.is_dataclass(cls) or is_named_tuple(cls):

        def made(fields: dict[str, Any]) -> Any:
            return cls(**fields)

    elif issubclass(cls, dict):

        def made(fields: dict[str, Any]) -> Any:
            return cls(fields)

    else:
        raise DepgraphError(
            f"{where} returns a {cls.__name__}, which is no dataclass, named tuple or dict; its "
            "forward cannot be rewritten"
        )
    made.__name__ = made.__qualname__ = f"make_{cls.__name__}"
    return made


def _with_argument(
    node: fx.Node, argument: str, value: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The arguments of an ATen call with one of them replaced."""
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = schema.index(argument)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, argument: value}
