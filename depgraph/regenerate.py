"""Writes a module's forward anew from its own trace, at the sizes of a plan, for both modes.

Calls of child modules stay calls, so their mode, hooks and state keep working; sizes that come from
the inputs (batch, tokens) are read from the inputs at run time; every other size is the plan's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from operator import getitem, mul
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph._program import (
    Program,
    function_name,
    original_class,
    programmed_class,
    require,
    to_program,
)
from depgraph.axes import Atom, Axis, axis_atoms, axis_size, kept_indices
from depgraph.errors import DepgraphError
from depgraph.literals import GROUPED, PARTING, SIZE_ARGUMENTS, literal_axes
from depgraph.propagate import Propagation, arguments, op_name
from depgraph.rules.convolve import group_axis
from depgraph.trace import ModuleCall, Trace, shape, structural_copy, trace_forward


class Regenerator:
    """Generates forwards for the modules of one model; blocks that are alike share their traces."""

    def __init__(self, outer: Propagation, kept: Mapping[Atom, Tensor]) -> None:
        self._outer = outer
        self._kept = kept
        self._traces: dict[Any, tuple[Trace, Trace]] = {}

    def generate(
        self, module: nn.Module, call: ModuleCall, tensors: Mapping[str, fx.Node]
    ) -> type[nn.Module]:
        """A class for a module whose forward computes with the sizes of the plan.

        Parameters
        ----------
        module : nn.Module
            Before slicing; not changed.
        call : ModuleCall
            How the model calls it.
        tensors : mapping of str to fx.Node
            The outer node of each of the module's parameters and buffers, by local name.

        Returns
        -------
        type
            To assign to ``module.__class__``.

        Raises
        ------
        DepgraphError
            When the forward does what a program cannot say.
        """
        outer_inputs = _given_nodes(call)
        programs: dict[str, Program] = {}
        for mode, traced in zip(("eval", "train"), self._traced(module, call), strict=True):
            seeds = dict(zip(traced.inputs, map(self._outer.axes, outer_inputs), strict=True))
            seeds.update((node, self._outer.axes(tensors[n])) for n, node in traced.tensors.items())
            p = Propagation(traced, seeds)
            p.run(outputs_are_fixed=False)
            programs[mode] = to_program(_Writer(p, call, self._kept, module).write())
        if programs["train"] == programs["eval"]:
            del programs["train"]
        return programmed_class(original_class(module), programs)

    def _traced(self, module: nn.Module, call: ModuleCall) -> tuple[Trace, Trace]:
        args, kwargs = pytree.tree_map_only(fx.Node, _meta_like, (call.args, call.kwargs))
        shapes = [(shape(x), str(x.meta["val"].dtype)) for x in _given_nodes(call)]
        constants = pytree.tree_map_only(fx.Node, lambda _: None, (call.args, call.kwargs))
        key = (_likeness(module), str(shapes), repr(constants))
        if key not in self._traces:
            copy = structural_copy(module)
            copy.eval()  # what these two return is up to the class
            evaluating = trace_forward(copy, args, kwargs)
            copy.train()
            self._traces[key] = (evaluating, trace_forward(copy, args, kwargs))
        return self._traces[key]


def _likeness(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules whose traces are equal: same classes, attributes and tensor shapes."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        tensors = {**child._parameters, **child._buffers}
        shapes = [(key, None if t is None else tuple(t.shape)) for key, t in tensors.items()]
        parts.append((name, type(child), str(shapes)))
        for key, value in vars(child).items():
            if not key.startswith("_") and key != "training":
                plain = isinstance(value, (bool, int, float, str, tuple, list, type(None)))
                parts.append((key, repr(value) if plain else id(value)))
    return tuple(parts)


def _given_nodes(call: ModuleCall) -> list[fx.Node]:
    return [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, fx.Node)]


def _meta_like(node: fx.Node) -> Tensor:
    fake = node.meta["val"]
    return torch.empty(fake.shape, dtype=fake.dtype, device="meta")


class _Writer:
    """Turns one module's trace into a graph with child calls and free batch and token sizes."""

    def __init__(
        self, p: Propagation, call: ModuleCall, kept: Mapping[Atom, Tensor], module: nn.Module
    ) -> None:
        self.p = p
        self.trace: Trace = p.trace
        self.call = call
        self.kept = kept
        self.sizes = {atom: len(units) for atom, units in kept.items()}
        self.module = module
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.dynamic: dict[Atom, tuple[fx.Node, int]] = {}
        self.names = {node: name for name, node in self.trace.tensors.items()}

    def write(self) -> fx.Graph:
        self._placeholders()
        children = {c.start: c for c in self.trace.calls if c.depth == 1 and c.end > c.start}
        root = next(c for c in self.trace.calls if c.depth == 0)
        index = root.start
        while index < root.end:
            child = children.get(index)
            if child is not None:
                self._child(child)
                index = child.end
            else:
                self._op(self.trace.nodes[index])
                index += 1
        self.graph.output(self._mapped(root.output))
        return self.graph

    def _placeholders(self) -> None:
        signature = inspect.signature(type(self.module).forward)
        names = list(signature.parameters)[1:]
        bound = signature.bind(None, *self.call.args, **self.call.kwargs).arguments
        order = dict(zip(map(id, _given_nodes(self.call)), self.trace.inputs, strict=True))
        checks = []
        for name in names:
            parameter = signature.parameters[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if bound.get(name):
                    raise DepgraphError(f"{self._where()} takes '*{name}', which is not supported")
                continue
            default = parameter.default
            extra = {} if default is parameter.empty else {"default_value": default}
            placeholder = self.graph.placeholder(name, **extra)
            value = bound.get(name, default)
            if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(value)):
                self._unpack(placeholder, value, order)
            else:
                checks.append((placeholder, value, name))
        for placeholder, value, name in checks:
            self.graph.call_function(require, (placeholder, value, name))

    def _unpack(self, source: fx.Node, value: Any, order: dict[int, fx.Node]) -> None:
        """The tensors within an argument, which may be a container of them."""
        if isinstance(value, fx.Node):
            self.made[order[id(value)]] = source
            self._note_dynamic(order[id(value)], source)
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(item)):
                self._unpack(self.graph.call_function(getitem, (source, key)), item, order)

    def _note_dynamic(self, node: fx.Node, placeholder: fx.Node) -> None:
        for dim, axis in enumerate(self.p.axes(node)):
            if len(axis) == 1 and isinstance(axis[0], Atom) and axis[0].frozen:
                self.dynamic.setdefault(axis[0], (placeholder, dim))

    def _where(self) -> str:
        return f"module '{self.call.name}' ({type(self.module).__name__})"

    def _child(self, child: ModuleCall) -> None:
        args = self._mapped(child.args)
        kwargs = self._mapped(child.kwargs)
        result = self.graph.call_module(child.name, args, kwargs)
        outputs = child.output if isinstance(child.output, (tuple, list)) else None
        if outputs is None:
            self.made[child.output] = result
            return
        for i, output in enumerate(outputs):
            if isinstance(output, fx.Node):
                self.made[output] = self.graph.call_function(getitem, (result, i))

    def _op(self, node: fx.Node) -> None:
        target: Any = node.target
        function_name(target)  # refuses what a program cannot hold
        args, kwargs = self._mapped(node.args), dict(self._mapped(node.kwargs))
        args, kwargs = pytree.tree_map_only(torch.device, self._device, (args, kwargs))
        name = op_name(node)
        if name in SIZE_ARGUMENTS:
            args, kwargs = self._with_sizes(node, SIZE_ARGUMENTS[name], args, kwargs)
        if name in GROUPED:
            args, kwargs = self._with_groups(node, GROUPED[name], args, kwargs)
        if name == "aten.scaled_dot_product_attention":
            kwargs.update(self._scale(node))
        if name in PARTING and self._is_cut(literal_axes(self.p, node)):
            target, args, kwargs = self._with_parts(node)
        if name in ("aten.slice", "aten.narrow"):
            target, args, kwargs = self._with_range(node, target, args, kwargs)
        self.made[node] = self.graph.call_function(target, args, kwargs)

    def _device(self, _: torch.device) -> fx.Node:
        """Where the module's inputs are, wherever it was traced."""
        return self.graph.call_function(getattr, (next(iter(self.made.values())), "device"))

    def _is_cut(self, axes: Iterable[Axis]) -> bool:
        return any(atom in self.kept for axis in axes for atom in axis_atoms(axis))

    def _with_parts(self, node: fx.Node) -> tuple[Any, Any, dict[str, Any]]:
        """Any way of parting a dimension, as parts of stated sizes."""
        sizes = [self._size(axis) for axis in literal_axes(self.p, node)]
        a = arguments(node)
        split = torch.ops.aten.split_with_sizes.default
        return split, (self._node(a["self"]), sizes, a["dim"]), {}

    def _with_range(
        self, node: fx.Node, target: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """A range of a pruned dimension: what is kept before its start, and before its end."""
        a = arguments(node)
        axis = self.p.axes(a["self"])[a["dim"]]
        if not self._is_cut([axis]):
            return target, args, kwargs
        size = axis_size(axis)
        start = min((a.get("start") or 0) % (size + 1), size)
        indices = kept_indices(axis, self.kept)
        first = int((indices < start).sum())
        last = int((indices < start + shape(node)[a["dim"]]).sum())
        part = torch.ops.aten.slice.Tensor
        return part, (self._node(a["self"]), a["dim"], first, last), {}

    def _scale(self, node: fx.Node) -> dict[str, float]:
        """The temperature of the original width, where the op would take that of the new one."""
        a = arguments(node)
        axis = self.p.axes(a["query"])[-1]
        if a["scale"] is not None or axis_size(axis, self.sizes) == axis_size(axis):
            return {}
        return {"scale": axis_size(axis) ** -0.5}

    def _with_sizes(
        self, node: fx.Node, argument: str, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        given = list(arguments(node)[argument])
        axes = self.p.axes(node)[-len(given) :] if given else []
        new = [
            size if size == -1 else self._size(axis) for size, axis in zip(given, axes, strict=True)
        ]
        return _with_argument(node, argument, new, args, kwargs)

    def _with_groups(
        self, node: fx.Node, argument: str, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        axis = group_axis(self.p, node)
        if not self._is_cut([axis]):
            return args, kwargs
        return _with_argument(node, argument, axis_size(axis, self.sizes), args, kwargs)

    def _size(self, axis: Axis) -> Any:
        """Size of an axis: a number, or an expression of the inputs' sizes."""
        fixed = 1
        result: Any = None
        for factor in axis:
            if isinstance(factor, Atom) and factor in self.dynamic:
                source, dim = self.dynamic[factor]
                size = self.graph.call_method("size", (source, dim))
                result = size if result is None else self._times(result, size)
            else:
                fixed *= axis_size((factor,), self.sizes)
        if result is None:
            return fixed
        return result if fixed == 1 else self._times(result, fixed)

    def _times(self, left: Any, right: Any) -> fx.Node:
        return self.graph.call_function(mul, (left, right))

    def _mapped(self, value: Any) -> Any:
        return pytree.tree_map_only(fx.Node, self._node, value)

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
