"""Finds attributes with which a module computes what the plan predicts, by running it alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.costing.cost import value_shape
from depgraph.coupling.axes import axis_size, kept_sizes
from depgraph.coupling.propagate import Propagation, op_name
from depgraph.coupling.rules.convolve import group_axis
from depgraph.graph import DependencyGraph
from depgraph.plan import Plan
from depgraph.rewriting.attributes import candidates, with_integer
from depgraph.rewriting.literals import GROUPED
from depgraph.slicing.edits import Edits
from depgraph.slicing.verify import computing
from depgraph.tracing.modules import is_layer, named_modules, named_tensors, structural_copy
from depgraph.tracing.trace import TraceError, shape, trace_forward

_T = TypeVar("_T")


class Fitting:
    """What graph and plan say of single modules of one model."""

    def __init__(self, graph: DependencyGraph, plan: Plan, model: nn.Module) -> None:
        self.graph = graph
        self.plan = plan
        self.model = model
        self.p: Propagation = graph.propagation
        self.kept = graph.kept_atoms(plan)
        self.sizes = kept_sizes(self.kept)
        self.modules = named_modules(model)
        self.calls = graph.traced.calls_of
        tensors, _ = named_tensors(model)
        self.first_name = {id(tensor): name for name, tensor in tensors.items()}

    def likeliest(self, name: str) -> dict[str, Any]:
        """The attributes of a module that name a pruned size, as its axes tell most directly."""
        options = {path: values[0] for path, values in self.options(name).items()}
        return self._chosen(self.modules[name], options)

    def own_tensors(self, module: nn.Module, recurse: bool = False) -> dict[str, str]:
        """The trace's names of a module's parameters and buffers, by local name."""
        found = itertools.chain(
            module.named_parameters(recurse=recurse, remove_duplicate=False),
            module.named_buffers(recurse=recurse, remove_duplicate=False),
        )
        return {local: self.first_name[id(tensor)] for local, tensor in found}

    def own_nodes(self, module: nn.Module) -> dict[str, fx.Node]:
        """Traced nodes of the parameters and buffers that a module itself holds."""
        nodes = self.graph.traced.tensors
        return {local: nodes[name] for local, name in self.own_tensors(module).items()}

    def options(self, name: str) -> dict[tuple[Any, ...], list[int]]:
        """New values that each integer of a module may take, the likeliest first."""
        module = self.modules[name]
        nodes, calls = self.own_nodes(module), self.calls.get(name, [])
        return candidates(self.p, module, calls, nodes, self.sizes)

    def groups(self, name: str) -> int | None:
        """New number of groups of a module that runs one grouped op; None where there is none."""
        for node in self._own_ops(name):
            if node.op == "call_function" and op_name(node) in GROUPED:
                axis = group_axis(self.p, node)
                return axis_size(axis, self.sizes) if axis else None
        return None

    def _chosen(self, module: nn.Module, choice: dict[tuple[Any, ...], int]) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        for (attribute, *path), new in choice.items():
            value = attributes.get(attribute, vars(module)[attribute])
            attributes[attribute] = with_integer(value, tuple(path), new)
        return attributes

    def _own_ops(self, name: str) -> Iterator[fx.Node]:
        owner = self.graph.traced.owner
        for call in self.calls.get(name, []):
            for node in self.graph.traced.nodes[call.start : call.end]:
                if owner.get(node) == name:
                    yield node

    def trouble(self, name: str, attributes: dict[str, Any], outer: Edits) -> str:
        """What keeps a module, sliced and with these attributes, from the predicted shapes.

        Nothing where it computes them.
        """
        module = self.modules[name]
        trial = structural_copy(module)
        prefix = f"{name}." if name else ""
        edits = Edits(
            attributes=_within(prefix, outer.attributes), classes=_within(prefix, outer.classes)
        )
        edits.attributes[""] = attributes
        edits.tensors = {
            id(tensor): torch.empty(
                value_shape(self.p, self._node_of(tensor), self.sizes),
                dtype=tensor.dtype,
                device="meta",
            )
            for tensor in (*trial.parameters(), *trial.buffers())
        }
        edits.apply(trial)
        for call in self.calls[name]:
            args, kwargs = pytree.tree_map_only(fx.Node, self.predicted, (call.args, call.kwargs))
            try:
                traced = trace_forward(trial, args, kwargs)
            except TraceError as error:
                return str(error)
            expected = [self.predicted(x).shape for x in _nodes(call.output)]
            outputs = [node.meta["val"].shape for node in traced.outputs]
            if outputs != expected:
                return str(outputs)
            steps = [x for x in self._computing if call.start <= self._computing[x] < call.end]
            found = list(map(shape, computing(traced)))
            sizes = [value_shape(self.p, node, self.sizes) for node in steps]
            if len(found) == len(sizes) and found != sizes:  # what nobody reads is not traced
                return str(found)
        return ""

    @cached_property
    def _computing(self) -> dict[fx.Node, int]:
        """The calls that compute something, with their places in the trace."""
        place = {node: i for i, node in enumerate(self.graph.traced.nodes)}
        return {node: place[node] for node in computing(self.graph.traced)}

    def _node_of(self, tensor: Tensor) -> fx.Node:
        return self.graph.traced.tensors[self.first_name[id(tensor)]]

    def predicted(self, node: fx.Node) -> Tensor:
        fake = node.meta["val"]
        size = value_shape(self.p, node, self.sizes)
        return torch.empty(size, dtype=fake.dtype, device="meta")

    def fits(self, name: str, edits: Edits, known: dict[Any, str]) -> bool:
        """Whether a module, or one like it, runs with the attributes that it has been given."""
        return self.calls.get(name) is None or not self._known_trouble(name, edits, known)

    def _known_trouble(self, name: str, edits: Edits, known: dict[Any, str]) -> str:
        attributes = edits.attributes.get(name, {})
        module = self.modules[name]
        sizes = [value_shape(self.p, self._node_of(x), self.sizes) for x in module.parameters()]
        key = (type(module), repr(self.options(name)), repr(attributes), tuple(sizes))
        if key not in known:
            known[key] = self.trouble(name, attributes, edits)
        return known[key]

    def refit(self, name: str, edits: Edits, known: dict[Any, str]) -> bool:
        """Look for attributes of a module with which it runs; whether there are any.

        Two at once are other than likeliest only where one alone made a difference: trying all
        combinations would take time exponential in their number.
        """
        before = edits.attributes.get(name, {})
        options = self.options(name)
        likeliest = {path: values[0] for path, values in options.items()}
        other = [{path: value} for path, values in options.items() for value in values[1:]]
        pairs = ({**x, **y} for x, y in itertools.combinations(other, 2) if x.keys() != y.keys())
        troubles: set[str] = set()
        for count, change in enumerate(itertools.chain([{}], other, pairs)):
            if count > len(other) and len(troubles) == 1:
                break
            edits.attributes[name] = self._chosen(self.modules[name], {**likeliest, **change})
            troubles.add(self._known_trouble(name, edits, known))
            if "" in troubles:
                return True
        edits.attributes[name] = before
        return False

    def is_layer(self, name: str) -> bool:
        """Whether a module is one of torch's own layers, whose sizes are its parameters'."""
        return is_layer(self.modules[name])


def _within(prefix: str, found: dict[str, _T]) -> dict[str, _T]:
    """What is noted of the modules within one, by their names within it."""
    inside = {name: value for name, value in found.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in inside.items()}


def _nodes(value: Any) -> list[fx.Node]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, fx.Node)]
