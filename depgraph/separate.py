"""Lets parts of a layer that a view tells apart differ in size: the view becomes a split.

``qkv.reshape(B, N, 3, heads, head_dim)`` holds q, k and v in one rectangle, so that they have to
lose the same head dims. A split at two places, of the same numbers in the same order, does not; the
layer stays one matrix product and no weight is moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import getitem

import torch
from torch import Tensor, fx, nn

from depgraph._writer import Source, Writer
from depgraph.axes import Atom, axis_atoms
from depgraph.errors import DepgraphError
from depgraph.literals import PARTING
from depgraph.propagate import Propagation, arguments, op_name
from depgraph.regenerate import Regenerator
from depgraph.trace import named_tensors, shape

_VIEWS = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unflatten")
_MOVES = frozenset(
    f"aten.{name}"
    for name in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "unsqueeze", "squeeze")
)
_COPIES = ("aten.contiguous", "aten.clone")

Labels = tuple[int | None, ...]
"""Which dimension of a view each dimension of a value is; None for one of size 1 put in later."""


@dataclass(frozen=True)
class _Take:
    """One part, as the forward goes on with it."""

    index: int
    labels: Labels
    copied: bool


@dataclass(frozen=True)
class _Stack:
    """Equal parts that a view stacks along a dimension of its own, and all that is done with them.

    Attributes
    ----------
    view : fx.Node
    source : fx.Node
        What is viewed; ``dim`` of it becomes ``before x parts x after``, the rest stays.
    place : int
        The dimension of the view that tells the parts apart.
    takes : dict of fx.Node to _Take
        The values that are one part each.
    inside : set of fx.Node
        The view and the steps between it and these; nothing else reads them.
    """

    view: fx.Node
    source: fx.Node
    dim: int
    place: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    takes: dict[fx.Node, _Take] = field(default_factory=dict)
    inside: set[fx.Node] = field(default_factory=set)

    @property
    def parts(self) -> int:
        return shape(self.view)[self.place]


def separated_classes(p: Propagation, model: nn.Module) -> dict[str, type[nn.Module]]:
    """Classes with forwards that split where those of a model's modules view.

    Parameters
    ----------
    p : Propagation
        Of the model as it is.
    model : nn.Module
        Stays as it is.

    Returns
    -------
    dict of str to type
        By name of the module. Left out: modules that hand on the view itself, or whose forward
        cannot be generated; there the parts keep the same size.
    """
    names = {id(tensor): name for name, tensor in named_tensors(model)[0].items()}
    regenerator = Regenerator(p, {}, model, writer=_SplittingWriter)
    classes = {}
    for name in dict.fromkeys(
        p.trace.owner.get(stack.view, "") for stack in _stacks(p, p.trace.nodes)
    ):
        module = model.get_submodule(name)
        tensors = {
            local: names[id(tensor)]
            for found in (module.named_parameters, module.named_buffers)
            for local, tensor in found(remove_duplicate=False)
        }
        try:
            classes[name] = regenerator.generate(module, p.trace.calls_of[name][0], tensors)
        except DepgraphError:
            continue
    return classes


class _SplittingWriter(Writer):
    """Writes a forward in which stacked parts are split instead."""

    def __init__(self, source: Source, kept: Mapping[Atom, Tensor], module: nn.Module) -> None:
        super().__init__(source, kept, module)
        own = self.trace.nodes[self.call.start : self.call.end]
        found = _stacks(self.p, own)
        stacks = [s for s in found if self.trace.owner.get(s.view, "") == self.call.name]
        self._stack_of = {node: stack for stack in stacks for node in (*stack.inside, *stack.takes)}
        self._pieces: dict[fx.Node, list[fx.Node]] = {}

    def _op(self, node: fx.Node) -> None:
        stack = self._stack_of.get(node)
        if stack is None:
            super()._op(node)
        elif node is stack.view:
            self._pieces[node] = self._split(stack)
        elif node in stack.takes:
            self.made[node] = self._taken(stack, stack.takes[node])

    def _split(self, stack: _Stack) -> list[fx.Node]:
        """The parts, with the dimensions that the view gives them."""
        call, aten = self.graph.call_function, torch.ops.aten
        x, dim, size = self._node(stack.source), stack.dim, prod(stack.after)
        if stack.before:
            x = call(aten.unflatten.int, (x, dim, [*stack.before, stack.parts * size]))
            dim += len(stack.before)
        split = call(aten.split_with_sizes.default, (x, [size] * stack.parts, dim))
        pieces = [call(getitem, (split, i)) for i in range(stack.parts)]
        if len(stack.after) > 1:
            pieces = [call(aten.unflatten.int, (x, dim, [*stack.after])) for x in pieces]
        return pieces

    def _taken(self, stack: _Stack, take: _Take) -> fx.Node:
        call, aten = self.graph.call_function, torch.ops.aten
        x = self._pieces[stack.view][take.index]
        order = [label - (label > stack.place) for label in take.labels if label is not None]
        if order != sorted(order):
            x = call(aten.permute.default, (x, order))
        for dim, label in enumerate(take.labels):
            if label is None:
                x = call(aten.unsqueeze.default, (x, dim))
        return call(aten.contiguous.default, (x,)) if take.copied else x


def _stacks(p: Propagation, nodes: Sequence[fx.Node]) -> Iterator[_Stack]:
    """Every stack of parts that may lose units, and that one module makes and takes apart."""
    outputs = set(p.trace.outputs)
    for node in nodes:
        if node.op != "call_function" or op_name(node) not in _VIEWS:
            continue
        stack = _stack(p, node)
        if stack is not None and outputs.isdisjoint((*stack.inside, *stack.takes)):
            yield stack


def _stack(p: Propagation, view: fx.Node) -> _Stack | None:
    inside: set[fx.Node] = set()
    takes: dict[fx.Node, _Take] = {}
    places: set[int] = set()
    queue: list[tuple[fx.Node, Labels, bool]] = [(view, tuple(range(len(shape(view)))), False)]
    while queue:
        node, labels, copied = queue.pop()
        inside.add(node)
        for user in node.users:
            if p.trace.owner.get(user, "") != p.trace.owner.get(view, ""):
                return None
            moved = _moved(user, labels)
            if moved is not None:
                queue.append((user, moved, copied or op_name(user) in _COPIES))
                continue
            parted = _parted(user, labels)
            if parted is None:
                return None
            place, found = parted
            places.add(place)
            takes.update((x, _Take(index, own, copied)) for x, index, own in found)
            inside.add(user)
    if len(places) != 1:
        return None
    return _placed(p, view, places.pop(), takes, inside - takes.keys())


def _moved(node: fx.Node, labels: Labels) -> Labels | None:
    """The labels after an op that only moves dimensions; None for another op."""
    if op_name(node) in _COPIES:
        return labels
    if op_name(node) not in _MOVES:
        return None
    # each dimension can be told by its size
    probe = torch.empty([1 if x is None else x + 2 for x in labels], device="meta")
    sizes = node.target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
    return tuple(None if size == 1 else size - 2 for size in sizes)


def _parted(node: fx.Node, labels: Labels) -> tuple[int, list[tuple[fx.Node, int, Labels]]] | None:
    """Which dimension an op tells apart by its indices, and the parts; None for another op."""
    name = op_name(node)
    if name not in ("aten.unbind", "aten.select", *PARTING):
        return None
    dim = arguments(node)["dim"] % len(labels)
    place = labels[dim]
    if place is None:
        return None
    rest = (*labels[:dim], *labels[dim + 1 :])
    if name == "aten.select":
        size = shape(node.all_input_nodes[0])[dim]
        return place, [(node, arguments(node)["index"] % size, rest)]
    if any(op_name(user) != "getitem" for user in node.users):
        return None
    if name != "aten.unbind":
        if any(piece.shape[dim] != 1 for piece in node.meta["val"]):
            return None
        rest = (*labels[:dim], None, *labels[dim + 1 :])
    return place, [(user, int(user.args[1]), rest) for user in node.users]  # type: ignore[arg-type]


def _placed(
    p: Propagation,
    view: fx.Node,
    place: int,
    takes: dict[fx.Node, _Take],
    inside: set[fx.Node],
) -> _Stack | None:
    """The stack, where one dimension of what is viewed becomes ``before x parts x after``."""
    source = arguments(view)["self"]
    whole, viewed = shape(source), shape(view)
    added = len(viewed) - len(whole)
    for dim in range(max(0, place - added), min(place, len(whole) - 1) + 1):
        after = dim + added
        alike = whole[:dim] == viewed[:dim] and whole[dim + 1 :] == viewed[after + 1 :]
        own = [axis for d, axis in enumerate(p.axes(view)) if dim <= d <= after and d != place]
        free = any(atom.frozen is None for axis in own for atom in axis_atoms(axis))
        if alike and free and place < after:
            before, behind = viewed[dim:place], viewed[place + 1 : after + 1]
            return _Stack(view, source, dim, place, before, behind, takes, inside)
    return None
