"""The modules of one model that keep their forward because weights make up for its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.coupling.axes import Atom
from depgraph.graph import DependencyGraph
from depgraph.plan import Factor
from depgraph.rescaling.temperature import Rescaling, Temperatures
from depgraph.slicing.edits import Edits
from depgraph.slicing.switches import Given, agree_when_switched
from depgraph.tracing.alike import Likeness, UnlikeError
from depgraph.tracing.calls import ModuleCall, Unread


class Rescalings:
    """Which modules keep their forward, and what that takes.

    Parameters
    ----------
    graph : DependencyGraph
    sizes : mapping of Atom to int
        Units left of each pruned atom.
    model : nn.Module
        Before it is cut.
    modules : mapping of str to nn.Module
        Its modules.
    names : callable
        The trace's names of a module's tensors, by local name.
    predicted : callable
        A meta tensor of the size that a value has in the sliced model.
    told : bool
        Whether scales that a fused attention is told change, too.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        sizes: Mapping[Atom, int],
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        names: Callable[[nn.Module], Mapping[str, str]],
        predicted: Callable[[fx.Node], Tensor],
        told: bool,
    ) -> None:
        self._trace = graph.traced
        self._temperatures, *self._in_other_modes = (
            Temperatures(p, sizes, modules, told) for p in graph.in_modes
        )
        self._likeness = Likeness(model)
        self._modules = modules
        self._names = names
        self._predicted = predicted
        self._active: dict[str, Rescaling] = {}
        self._proven: dict[Any, bool] = {}
        self._checked: set[str] = set()

    def find(self) -> set[str]:
        """Work out what can be made up for, and in which modules it cannot be."""
        known: dict[Any, tuple[ModuleCall, Rescaling]] = {}
        for name in self._temperatures.cut:
            found = self._found(name, known)
            if found is not None:
                self._active[name] = found
        return self._temperatures.cut.keys() - self._active.keys()

    def _found(self, name: str, known: dict[Any, tuple[ModuleCall, Rescaling]]) -> Rescaling | None:
        """What makes up for the cut in a module; that of one which is alike, where there is one."""
        key, calls = None, self._trace.calls_of.get(name, [])
        if len(calls) == 1:
            call = calls[0]
            with suppress(UnlikeError):
                nodes = self._trace.nodes[call.start : call.end]
                key = (
                    self._likeness.of(self._modules[name]),
                    tuple(node.target for node in nodes),
                    self._temperatures.widths(name),
                )
        if key in known:
            return self._translated(*known[key], calls[0])
        self._temperatures.weights.reached = 0
        found = self._temperatures.rescaling(name)
        if found is not None and key is not None and self._is_inside(found, calls[0]):
            known[key] = calls[0], found
        return found

    def _is_inside(self, found: Rescaling, call: ModuleCall) -> bool:
        """Whether all that has to do with factors happens in one call, to its module's own."""
        nodes = set(self._trace.nodes[call.start : call.end])
        inner = set(self._names(self._modules[call.name]).values())
        read = [self._trace.tensors[name] for name, _, _ in found.factors]
        return (
            self._temperatures.weights.reached < call.end
            and nodes.issuperset(found.numbers)
            and inner.issuperset(name for name, _, _ in found.factors)
            and all(nodes.issuperset(tensor.users) for tensor in read)
            and set(found.attributes) <= {call.name}
        )

    def _translated(self, call: ModuleCall, found: Rescaling, other: ModuleCall) -> Rescaling:
        """The same in another call, of a module that is alike."""
        nodes = self._trace.nodes
        place = {node: i for i, node in enumerate(nodes[call.start : call.end])}
        local = {name: key for key, name in self._names(self._modules[call.name]).items()}
        names = self._names(self._modules[other.name])
        return Rescaling(
            {nodes[other.start + place[node]]: x for node, x in found.numbers.items()},
            dict.fromkeys([other.name], *found.attributes.values()) if found.attributes else {},
            [(names[local[name]], mask, factor) for name, mask, factor in found.factors],
        )

    @property
    def numbers(self) -> dict[fx.Node, float]:
        """Calls that compute with another number than in the original."""
        found = [rescaling.numbers for rescaling in self._active.values()]
        for temperatures in self._in_other_modes:
            others = map(temperatures.changed, self._active)
            found += [other.numbers for other in others if other is not None]
        return {node: number for numbers in found for node, number in numbers.items()}

    @property
    def factors(self) -> tuple[Factor, ...]:
        """What to multiply of which parameter."""
        return tuple(factor for found in self._active.values() for factor in found.factors)

    @property
    def kept(self) -> list[str]:
        """Modules that keep their forward, unless something else speaks against it."""
        return list(self._active)

    def computing(self, module: str) -> list[str]:
        """Modules that keep their forward, with a number that this module computes."""
        owner = self._trace.owner
        return [
            name
            for name, found in self._active.items()
            if any(owner.get(node, "") == module for node in found.numbers)
        ]

    def note(self, edits: Edits) -> None:
        """Bring floats into line with the forwards that are generated."""
        owner = self._trace.owner
        for name, found in list(self._active.items()):
            owners = {name, *(owner.get(node, "") for node in found.numbers)}
            lost = not edits.classes.keys().isdisjoint(owners)
            if lost:
                del self._active[name]
            for inner, floats in found.attributes.items():
                old = {key: vars(self._modules[inner])[key] for key in floats} if lost else floats
                edits.attributes[inner] = {**edits.attributes.get(inner, {}), **old}

    def unproven(self, small: nn.Module) -> list[str]:
        """Modules whose weights do not make up for the other mode, or for a flag that is turned."""
        return [name for name in self._active if not self._is_proven(name, small)]

    def _is_proven(self, name: str, small: nn.Module) -> bool:
        """Whether a module or one that is alike has been proven, or can be now."""
        if name in self._checked:
            return True
        whole = self._whole(name)
        calls = self._trace.calls_of.get(whole, [])
        key: Any = whole
        with suppress(UnlikeError):  # then it is alike to itself only
            key = (self._likeness.of(self._modules[whole]), name.removeprefix(whole))
        if key not in self._proven:
            self._proven[key] = bool(calls and whole) and all(
                self._agrees(whole, name, call, small) for call in calls
            )
        if self._proven[key]:
            self._checked.add(name)
        return self._proven[key]

    def _whole(self, name: str) -> str:
        """The innermost module that holds another one and the weights that make up for it."""
        path = name.split(".")
        for parameter, _, _ in self._active[name].factors:
            parts = parameter.split(".")[:-1]
            same = [a == b for a, b in zip(path, parts, strict=False)]
            path = path[: (*same, False).index(False)]
        while path and ".".join(path) not in self._trace.calls_of:
            path = path[:-1]
        return ".".join(path)

    def _agrees(self, whole: str, name: str, call: ModuleCall, small: nn.Module) -> bool:
        if any(isinstance(leaf, Unread) for leaf in pytree.tree_leaves((call.args, call.kwargs))):
            return False
        module = self._modules[whole]
        local = {found: key for key, found in self._names(module).items()}
        inside = [
            (local[parameter], mask, factor)
            for other, found in self._active.items()
            if other == whole or other.startswith(f"{whole}.")
            for parameter, mask, factor in found.factors
            if parameter in local
        ]
        given = (
            self._given(call, lambda node: node.meta["val"]),
            self._given(call, self._predicted),
        )
        modules = (module, small.get_submodule(whole))
        inner = name.removeprefix(whole).removeprefix(".")
        return agree_when_switched(modules, given, inner, inside)

    def _given(self, call: ModuleCall, value: Callable[[fx.Node], Tensor]) -> Given:
        given: Given = pytree.tree_map_only(fx.Node, value, (call.args, call.kwargs))
        return given
