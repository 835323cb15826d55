"""Turns one call of a module in a trace into a graph with the sizes of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from depgraph._calls import Path, Unread
from depgraph._program import (
    function_name,
    rebuild,
    require,
    require_same,
)
from depgraph._samples import goes_through_samples
from depgraph._sizes import Sizes
from depgraph._trusted import qualified_name
from depgraph.axes import Atom, Axis, axis_atoms, axis_size, kept_sizes
from depgraph.errors import DepgraphError
from depgraph.literals import (
    COUNTS,
    GROUPED,
    PARTING,
    RANGES,
    SIZE_ARGUMENTS,
    kept_range,
    literal_axes,
    spelled_sizes,
)
from depgraph.propagate import Propagation, arguments, op_name
from depgraph.rules.convolve import group_axis
from depgraph.trace import ModuleCall, Trace
from depgraph.work import batch_atoms


@dataclass(frozen=True)
class Source:
    """Where a forward is read from: one call in one propagated trace.

    ``names`` and ``children`` are what the module itself calls its tensors and the modules in it.
    """

    p: Propagation
    call: ModuleCall
    names: dict[fx.Node, str]
    children: dict[str, str]


class Writer:
    """Turns one module's trace into a graph with child calls and free batch and token sizes."""

    def __init__(self, source: Source, kept: Mapping[Atom, Tensor], module: nn.Module) -> None:
        self.p = source.p
        self.trace: Trace = source.p.trace
        self.call = source.call
        self.names = source.names
        self.children = source.children
        self.kept = kept
        self.sizes = kept_sizes(kept)
        self.module = module
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.free_sizes = Sizes(self.graph, self.p, self.sizes)

    def write(self) -> fx.Graph:
        self._placeholders()
        self._fix_batch()
        index = self.call.start
        while index < self.call.end:
            child = self.trace.calls_at.get((self.call.depth + 1, index))
            if child is not None:
                self._child(child)
                index = child.end
            else:
                self._op(self.trace.nodes[index])
                index += 1
        self.graph.output(self._rebuilt(self.call.output))
        return self.graph

    def _rebuilt(self, output: Any, path: Path = ()) -> Any:
        """An output with what the module made of its parts, at any depth."""
        if not self.call.output_classes or not isinstance(output, (tuple, list, dict)):
            return self._mapped(output)
        if not isinstance(output, dict):
            return type(output)(self._rebuilt(x, (*path, i)) for i, x in enumerate(output))
        fields = {key: self._rebuilt(value, (*path, key)) for key, value in output.items()}
        cls = self.call.output_classes.get(path)
        if cls is None:
            return fields
        return self.graph.call_function(rebuild, (qualified_name(cls, self._where()), fields))

    def _placeholders(self) -> None:
        signature = inspect.signature(type(self.module).forward)
        names = list(signature.parameters)[1:]
        bound = signature.bind(None, *self.call.args, **self.call.kwargs).arguments
        placeholders = []
        for name in names:
            parameter = signature.parameters[name]
            default = parameter.default
            extra = {} if default is parameter.empty else {"default_value": default}
            star = str(parameter).partition(name)[0]  # "", "*" or "**"
            placeholder = self.graph.placeholder(star + name, **extra)
            value = bound.get(name, {} if star == "**" else () if star else default)
            placeholders.append((placeholder, value, name))
        for placeholder, value, name in placeholders:
            self._unpack(placeholder, value, name)

    def _fix_batch(self) -> None:
        """Where samples are handled one by one, refuse batches of other sizes."""
        trace, batch = self.trace, batch_atoms(self.p)
        own = (
            node
            for node in trace.nodes[self.call.start : self.call.end]
            if node.op == "call_function" and trace.owner.get(node, "") == self.call.name
        )
        size = self.free_sizes.of(batch)
        if isinstance(size, fx.Node) and goes_through_samples(self.p, own, batch):
            self.graph.call_function(require, (size, trace.batch, "batch_size"))

    def _unpack(self, source: fx.Node, value: Any, name: str) -> None:
        """The tensors within an argument, which may be a container of them; the rest must agree."""
        if isinstance(value, Unread):
            return
        if isinstance(value, fx.Node):
            if value in self.made:
                self.graph.call_function(require_same, (self.made[value], source, name))
            self.made[value] = source
            self.free_sizes.note(value, source)
            return
        if not any(isinstance(leaf, (fx.Node, Unread)) for leaf in pytree.tree_leaves(value)):
            if not isinstance(value, dict) or value:
                self.graph.call_function(require, (source, value, name))
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            self._unpack(self.graph.call_function(getitem, (source, key)), item, name)

    def _where(self) -> str:
        return f"module '{self.call.name}' ({type(self.module).__name__})"

    def _child(self, child: ModuleCall) -> None:
        args = self._mapped(child.args)
        kwargs = self._mapped(child.kwargs)
        # named by hand: a child called "self" would shadow the module in the generated code
        name = self.children[child.name]
        result = self.graph.create_node("call_module", name, args, kwargs, name="child")
        self._take(result, child.output, child.output_classes)

    def _take(
        self, result: fx.Node, output: Any, classes: Mapping[Path, type], path: Path = ()
    ) -> None:
        """The tensors in what a child returned, which may be a container of them."""
        if isinstance(output, fx.Node):
            self.made[output] = result
        elif isinstance(output, (tuple, list, dict)):
            items = output.items() if isinstance(output, dict) else enumerate(output)
            part = getitem if issubclass(classes.get(path, dict), dict) else getattr
            for key, item in items:
                if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(item)):
                    own = self.graph.call_function(part, (result, key))
                    self._take(own, item, classes, (*path, key))

    def _op(self, node: fx.Node) -> None:
        target: Any = node.target
        function_name(target)  # refuses what a program cannot hold
        args, kwargs = self._mapped(node.args), dict(self._mapped(node.kwargs))
        name = op_name(node)
        if name in SIZE_ARGUMENTS or name in COUNTS:
            args, kwargs = self._with_sizes(node, args, kwargs)
        if name in GROUPED:
            args, kwargs = self._with_groups(node, GROUPED[name], args, kwargs)
        if name == "aten.scaled_dot_product_attention":
            kwargs.update(self._scale(node))
        if name in PARTING and self._is_cut(literal_axes(self.p, node)):
            target, args, kwargs = self._with_parts(node)
        if name in RANGES:
            target, args, kwargs = self._with_range(node, target, args, kwargs)
        self.made[node] = self.graph.call_function(target, args, kwargs)

    def _device(self) -> fx.Node:
        """Where the module's inputs are, wherever it was traced."""
        return self.graph.call_function(getattr, (next(iter(self.made.values())), "device"))

    def _is_cut(self, axes: Iterable[Axis]) -> bool:
        return any(atom in self.kept for axis in axes for atom in axis_atoms(axis))

    def _with_parts(self, node: fx.Node) -> tuple[Any, Any, dict[str, Any]]:
        """Any way of parting a dimension, as parts of stated sizes."""
        sizes = [self.free_sizes.of(axis) for axis in literal_axes(self.p, node)]
        a = arguments(node)
        split = torch.ops.aten.split_with_sizes.default
        return split, (self._node(a["self"]), sizes, a["dim"]), {}

    def _with_range(
        self, node: fx.Node, target: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """A range of a pruned dimension: what is kept before its start, and before its end."""
        a = arguments(node)
        if not self._is_cut([self.p.axes(a["self"])[a["dim"]]]):
            return target, args, kwargs
        part = torch.ops.aten.slice.Tensor
        return part, (self._node(a["self"]), a["dim"], *kept_range(self.p, node, self.kept)), {}

    def _scale(self, node: fx.Node) -> dict[str, float]:
        """The temperature of the original width, where the op would take that of the new one."""
        a = arguments(node)
        axis = self.p.axes(a["query"])[-1]
        if a["scale"] is not None or axis_size(axis, self.sizes) == axis_size(axis):
            return {}
        return {"scale": axis_size(axis) ** -0.5}

    def _with_sizes(
        self, node: fx.Node, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        sizes = spelled_sizes(self.p, node)
        if not sizes:
            return args, kwargs
        argument = {**SIZE_ARGUMENTS, **COUNTS}[op_name(node)]
        # where nothing is left, torch cannot tell what an open size would be
        empty = not all(axis_size(axis, self.sizes) for axis in self.p.axes(node))
        new = [
            size if size == -1 and not empty else self.free_sizes.of(axis) for axis, size in sizes
        ]
        several = isinstance(arguments(node)[argument], (list, tuple))
        return _with_argument(node, argument, new if several else new[0], args, kwargs)

    def _with_groups(
        self, node: fx.Node, argument: str, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        axis = group_axis(self.p, node)
        if not self._is_cut([axis]):
            return args, kwargs
        return _with_argument(node, argument, axis_size(axis, self.sizes), args, kwargs)

    def _mapped(self, value: Any) -> Any:
        """Arguments in terms of the new graph."""
        return map_aggregate(value, self._mapped_leaf)

    def _mapped_leaf(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, torch.device):
            return self._device()
        if isinstance(value, Unread):
            return None
        # containers that only pytree knows, such as a library's outputs
        return value if pytree.tree_is_leaf(value) else pytree.tree_map(self._mapped_leaf, value)

    def _node(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            if node not in self.names:
                raise DepgraphError(
                    f"{self._where()} uses '{node.name}', which one of its children computes but "
                    "does not return; its forward cannot be generated"
                )
            self.made[node] = self.graph.get_attr(self.names[node])
        return self.made[node]


def _with_argument(
    node: fx.Node, argument: str, value: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The arguments of an ATen call with one of them replaced."""
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = schema.index(argument)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, argument: value}
