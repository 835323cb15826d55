"""Works out what has to change in a model for a plan: tensors, attributes, forwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph._attributes import candidates, layer_attributes, with_integer
from depgraph._edits import Edits
from depgraph._homogeneous import compact
from depgraph._modules import named_modules
from depgraph._rescaling import Rescalings
from depgraph._temperature import multiply
from depgraph.axes import (
    axis_atoms,
    axis_size,
    kept_indices,
    kept_sizes,
    select_indices,
)
from depgraph.cost import value_shape
from depgraph.errors import DepgraphError
from depgraph.graph import DependencyGraph
from depgraph.literals import GROUPED
from depgraph.plan import Plan
from depgraph.propagate import Propagation, op_name
from depgraph.rewrite import Rewriter
from depgraph.rules.convolve import group_axis
from depgraph.trace import (
    TraceError,
    named_tensors,
    shape,
    structural_copy,
    trace_forward,
)
from depgraph.verify import Mismatch, computing

_FUSED = (nn.TransformerEncoderLayer,)
"""torch's modules that hand their children's parameters to one fused kernel in evaluation."""


class Slicer:
    """Works out, from graph and plan, what has to change in one model."""

    def __init__(self, graph: DependencyGraph, plan: Plan, model: nn.Module) -> None:
        self.graph = graph
        self.plan = plan
        self.model = model
        self.p: Propagation = graph.propagation
        self.kept = graph.kept_atoms(plan)
        self.sizes = kept_sizes(self.kept)
        self.modules = named_modules(model)
        tensors, _ = named_tensors(model)
        self.first_name = {id(tensor): name for name, tensor in tensors.items()}
        self._reconsidered: set[str] = set()
        self.calls = graph.traced.calls_of
        self.rescalings = Rescalings(
            graph,
            self.sizes,
            model,
            self.modules,
            partial(self.own_tensors, recurse=True),
            self._predicted,
        )
        # many parameters share an axis
        self._indices = cache(partial(kept_indices, kept=self.kept))
        self._rewriter = Rewriter(self.p, self.kept, model, self.removed())

    def new_tensors(self, share: bool) -> dict[int, Tensor]:
        """The tensor to put in place of each old one; unpruned ones are shared or copied."""
        tensors, _ = named_tensors(self.model)
        new: dict[int, Tensor] = {}
        for name, old in tensors.items():
            value = self._sliced(name, old.detach())
            if value.data_ptr() == old.data_ptr() and not share:
                value = value.clone()
            if isinstance(old, nn.Parameter):
                value = (
                    old if value is old else nn.Parameter(value, requires_grad=old.requires_grad)
                )
            new[id(old)] = value
        return new

    def rescale(self, edits: Edits) -> None:
        """Multiply, in place, the new weights that make up for another temperature."""
        tensors, _ = named_tensors(self.model)
        for name, mask, factor in self.rescalings.factors:
            mask = compact(mask)
            indices = self._kept_indices(name)
            varied = {dim: here for dim, here in indices.items() if mask.shape[dim] > 1}
            new = edits.tensors[id(tensors[name])].detach()
            multiply(new, select_indices(mask, varied), factor)

    def _sliced(self, name: str, tensor: Tensor) -> Tensor:
        indices = self._kept_indices(name).items()
        return select_indices(tensor, {dim: here.to(tensor.device) for dim, here in indices})

    def _kept_indices(self, name: str) -> dict[int, Tensor]:
        node = self.graph.traced.tensors.get(name)
        return {
            dim: self._indices(axis)
            for dim, axis in enumerate(self.p.axes(node))
            if any(atom in self.kept for atom in axis_atoms(axis))
        }

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

    def removed(self) -> list[str]:
        """Every name of each module of which nothing is needed any more."""
        dead = {id(self.modules[name]) for name in self.graph.dead(self.sizes).modules}
        every = self.model.named_modules(remove_duplicate=False)
        return [name for name, module in every if id(module) in dead]

    def add_attributes(self, edits: Edits) -> None:
        """Integers of every module that name a pruned size."""
        for name, module in self.modules.items():
            nodes = self.own_nodes(module)
            shapes = {local: value_shape(self.p, node, self.sizes) for local, node in nodes.items()}
            attributes = layer_attributes(module, shapes, self._groups(name))
            if not attributes:
                attributes = self._chosen(module, _likeliest(self._options(name)))
            if attributes:
                edits.attributes[name] = attributes

    def _options(self, name: str) -> dict[tuple[Any, ...], list[int]]:
        """New values that each integer of a module may take, the likeliest first."""
        module = self.modules[name]
        nodes, calls = self.own_nodes(module), self.calls.get(name, [])
        return candidates(self.p, module, calls, nodes, self.sizes)

    def _groups(self, name: str) -> int | None:
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

    def _runs(self, name: str, attributes: dict[str, Any], outer: Edits) -> bool:
        """Whether a module, sliced and with these attributes, computes the predicted shapes."""
        module = self.modules[name]
        trial = structural_copy(module)
        edits = Edits(attributes=self._inner_attributes(trial, name))
        edits.attributes[""] = attributes
        edits.classes = {
            inner.removeprefix(f"{name}."): made
            for inner, made in outer.classes.items()
            if inner.startswith(f"{name}.")
        }
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
            args, kwargs = pytree.tree_map_only(fx.Node, self._predicted, (call.args, call.kwargs))
            try:
                traced = trace_forward(trial, args, kwargs)
            except TraceError:
                return False
            expected = [self._predicted(x).shape for x in _nodes(call.output)]
            if [node.meta["val"].shape for node in traced.outputs] != expected:
                return False
            steps = [x for x in self._computing if call.start <= self._computing[x] < call.end]
            found = list(map(shape, computing(traced)))
            sizes = [value_shape(self.p, node, self.sizes) for node in steps]
            if len(found) == len(sizes) and found != sizes:  # what nobody reads is not traced
                return False
        return True

    @cached_property
    def _computing(self) -> dict[fx.Node, int]:
        """The calls that compute something, with their places in the trace."""
        place = {node: i for i, node in enumerate(self.graph.traced.nodes)}
        return {node: place[node] for node in computing(self.graph.traced)}

    def _inner_attributes(self, trial: nn.Module, outer: str) -> dict[str, dict[str, Any]]:
        inner = {}
        for name, module in trial.named_modules():
            shapes = {
                local: value_shape(self.p, node, self.sizes)
                for local, node in self.own_nodes(module).items()
            }
            groups = self._groups(".".join(filter(None, (outer, name))))
            inner[name] = layer_attributes(module, shapes, groups)
        return inner

    def _node_of(self, tensor: Tensor) -> fx.Node:
        return self.graph.traced.tensors[self.first_name[id(tensor)]]

    def _predicted(self, node: fx.Node) -> Tensor:
        fake = node.meta["val"]
        size = value_shape(self.p, node, self.sizes)
        return torch.empty(size, dtype=fake.dtype, device="meta")

    def add_classes(self, edits: Edits) -> None:
        """Rewritten forwards where no weights make up for a temperature.

        An attention that loses head dims has another temperature: a fused one takes its default
        scale from the width it sees, and a module may switch between the fused and the written-out
        form at any time.
        """
        generated = self.rescalings.find()
        for name in self.modules:
            # a softmax that is a module of its own computes no temperature: whoever calls it does
            if self.calls.get(name) and name in generated and not self._is_layer(name):
                edits.classes[name] = self.generated(name)
        self.rescalings.note(edits)

    def unfit(self, edits: Edits, small: nn.Module) -> list[str]:
        """Modules that need a generated forward though the trace of the sliced model is right.

        A fused kernel would call past the generated forward of a child, and weights may not make
        up for what another mode computes.
        """
        return self.rescalings.unproven(small) + [
            name
            for name, module in self.modules.items()
            if isinstance(module, _FUSED)
            and name not in edits.classes
            and any(inner.startswith(f"{name}.") for inner in edits.classes)
        ]

    def repair(self, mismatch: Mismatch | None, edits: Edits, small: nn.Module) -> None:
        """Other attributes, or else a generated forward, for the innermost module to blame.

        Raises
        ------
        Mismatch
            The one given, when there is no such module.
        """
        if mismatch is None:
            names = self.unfit(edits, small)
        elif mismatch.of_number:
            names = self.rescalings.computing(mismatch.module)
        else:
            names = []
        if names:
            edits.classes.update((name, self.generated(name)) for name in names)
        elif mismatch is not None:
            self._repair(mismatch, edits)
        self.rescalings.note(edits)

    def _repair(self, mismatch: Mismatch, edits: Edits) -> None:
        path = mismatch.module
        while path in edits.classes or not self.calls.get(path) or self._is_layer(path):
            if not path:
                path = self._culprit(edits, mismatch)
                break
            path = path.rpartition(".")[0]
        alike = [
            name
            for name, module in self.modules.items()
            if type(module) is type(self.modules[path])
            and self.calls.get(name)
            and name not in edits.classes
        ]
        first = path not in self._reconsidered
        self._reconsidered.update(alike)
        known: dict[Any, bool] = {}  # of modules with the same choice one is tried; verify sees all
        if first and self._refit(path, edits, known):
            lost = [name for name in alike if name != path and not self._refit(name, edits, known)]
        else:
            lost = [name for name in alike if not first or not self._fits(name, edits, known)]
            lost += [] if path in lost else [path]
        try:
            edits.classes.update((name, self.generated(name)) for name in lost)
        except DepgraphError as error:
            text = f"{mismatch}; a forward of other sizes cannot be generated either: {error}"
            raise DepgraphError(text) from error

    def _culprit(self, edits: Edits, mismatch: Mismatch) -> str:
        """The innermost module that gives other shapes than predicted, though its inputs fit.

        A dimension of which one unit is left broadcasts, and the error shows elsewhere.
        """
        for name in sorted(self.calls, key=lambda name: -name.count(".")):
            known = not name or name in edits.classes or self._is_layer(name)
            if not known and not self._runs(name, edits.attributes.get(name, {}), edits):
                return name
        raise mismatch

    def _fits(self, name: str, edits: Edits, known: dict[Any, bool]) -> bool:
        """Whether a module, or one like it, runs with the attributes that it has been given."""
        attributes = edits.attributes.get(name, {})
        key = (type(self.modules[name]), repr(self._options(name)), repr(attributes))
        if key not in known:
            known[key] = self._runs(name, attributes, edits)
        return known[key]

    def _refit(self, name: str, edits: Edits, known: dict[Any, bool]) -> bool:
        """Look for attributes of a module with which it runs; whether there are any."""
        before = edits.attributes.get(name)
        for choice in _choices(self._options(name)):
            edits.attributes[name] = self._chosen(self.modules[name], choice)
            if self._fits(name, edits, known):
                return True
        if before is not None:
            edits.attributes[name] = before
        return False

    def _is_layer(self, name: str) -> bool:
        """Whether a module is one of torch's own layers, whose sizes are its parameters'."""
        module = self.modules[name]
        return type(module).__module__.startswith("torch.nn.") and not any(module.children())

    def generated(self, name: str) -> type[nn.Module]:
        """The class of a module with its forward generated for the plan."""
        module = self.modules[name]
        self._check_picks(name)
        tensors = self.own_tensors(module, recurse=True)
        return self._rewriter.rewritten(module, self.calls[name][0], tensors)

    def _check_picks(self, name: str) -> None:
        """Refuse to rewrite a forward whose trace had to assume how many entries it picks."""
        traced = self.graph.traced
        found = [node for node in traced.assumed if traced.owner.get(node, "") == name]
        if found:
            where = f"module '{name}'" if name else "the model"
            raise DepgraphError(
                f"{where} ({type(self.modules[name]).__name__}) picks as many entries as the data "
                f"says ({found[0].meta['source']}), so that its forward cannot be rewritten for "
                "other sizes; prune its parts by themselves"
            )


def _likeliest(options: dict[tuple[Any, ...], list[int]]) -> dict[tuple[Any, ...], int]:
    return {path: values[0] for path, values in options.items()}


def _choices(options: dict[tuple[Any, ...], list[int]]) -> Iterator[dict[tuple[Any, ...], int]]:
    """The likeliest values, then those with one or two others: the forward is generated else.

    Trying all combinations would take time exponential in the number of integers.
    """
    likeliest = _likeliest(options)
    other = [{path: value} for path, values in options.items() for value in values[1:]]
    yield likeliest
    yield from ({**likeliest, **change} for change in other)
    for one, two in itertools.combinations(other, 2):
        if one.keys() != two.keys():
            yield {**likeliest, **one, **two}


def _nodes(value: Any) -> list[fx.Node]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, fx.Node)]
