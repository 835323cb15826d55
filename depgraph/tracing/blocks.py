"""Recorded calls of modules, and how one is repeated for another module that is alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.tracing.alike import UnlikeError, looks, own_tensors, plain_key, within
from depgraph.tracing.calls import ModuleCall


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container with each leaf replaced, as ``pytree.tree_map`` does it, but fast."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(item, function) for item in value])
    if kind is dict:
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, (Tensor, fx.Node)) or pytree.tree_is_leaf(value):
        return function(value)
    return pytree.tree_map(function, value)


class Arguments:
    """What a call is given: the tensors in it, and a key of all that its forward can see of it.

    Attributes
    ----------
    tensors : list of Tensor
    key : object
        Hashable.
    can_change : bool
        Whether there is a container that a forward may change.

    Raises
    ------
    UnlikeError
        For an object that cannot be compared, such as a list of tensors.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Callable[[Tensor], Any]
    ) -> None:
        self.tensors: list[Tensor] = []
        self.can_change = False
        self._order: dict[Any, int] = {}
        self._seen = seen
        named = [(name, self._look(value)) for name, value in kwargs.items()]
        self.key = (self._look(args), tuple(named))

    def _look(self, value: Any) -> Any:
        kind = type(value)
        if kind is Tensor:
            node = self._seen(value)
            # which are one tensor, or of one node, a forward or its graph may depend on
            places = [self._order.setdefault(key, len(self._order)) for key in (id(value), node)]
            self.tensors.append(value)
            return (*places, *looks(value))
        if kind is tuple:
            return (kind, tuple([self._look(item) for item in value]))
        if kind in (list, dict, set):
            self.can_change = True
        return plain_key(value)


@dataclasses.dataclass(frozen=True)
class Block:
    """A recorded call in terms of what it was given and of its module's own tensors.

    Attributes
    ----------
    module : nn.Module
        Whose call it was.
    start : int
        Place of the first node.
    nodes : list of fx.Node
        In order.
    roles : dict of fx.Node to (str, int)
        What each node from outside was: a tensor of the arguments, or one of the module's own.
    rebound : list of ((str, int), fx.Node)
        Tensors from outside that were written to, and the node that they are from then on.
    calls : list of ModuleCall
        The calls in it, its own last.
    output : object
        What it gave back, each tensor as a `Made` or a role.
    writes : bool
        Whether any op writes to memory.
    source : str
        Line of the code that made the call.
    """

    module: nn.Module
    start: int
    nodes: list[fx.Node]
    roles: dict[fx.Node, tuple[str, int]]
    rebound: list[tuple[tuple[str, int], fx.Node]]
    calls: list[ModuleCall]
    output: Any
    writes: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Made:
    """Stands in a block's output for a tensor that one of its nodes made."""

    node: fx.Node
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Given:
    """Stands in a block's output for a tensor from outside."""

    role: tuple[str, int]


def tensors_within(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module and of all below it, in a fixed order."""
    return [tensor for inner in within(module) for tensor in own_tensors(inner)]


def check_inside(nodes: Iterable[fx.Node], calls: Iterable[ModuleCall], known: set[Any]) -> None:
    """Refuse a block that uses what is neither made in it nor given to it."""
    for node in nodes:
        if node.op != "call_function" or not known.issuperset(node._input_nodes):
            raise UnlikeError
    for call in calls:
        for value in (call.args, call.kwargs, call.output):
            _check_value(value, known)


def _check_value(value: Any, known: set[Any]) -> None:
    kind = type(value)
    if kind is fx.Node:
        if value not in known:
            raise UnlikeError
    elif kind is tuple or kind is list:
        for item in value:
            _check_value(item, known)
    elif kind is dict:
        for item in value.values():
            _check_value(item, known)
    else:
        plain_key(value)


def output_of(
    value: Any, node_of: Callable[[Tensor], fx.Node | None], roles: dict[int, tuple[str, int]]
) -> Any:
    """A result with each tensor replaced by what it is in terms of the block."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([output_of(item, node_of, roles) for item in value])
    if kind is dict:
        return {key: output_of(item, node_of, roles) for key, item in value.items()}
    if isinstance(value, Tensor):
        if id(value) in roles:
            return Given(roles[id(value)])
        node = node_of(value) if kind is Tensor else None
        if node is None:
            raise UnlikeError
        return Made(node, value)
    plain_key(value)
    return value


def names_in(first: nn.Module, second: nn.Module, name_of: dict[int, str]) -> dict[str, str]:
    """For each module in the first, the name of the one in its place in the second."""
    pairs = zip(within(first), within(second), strict=True)
    return {name_of[id(a)]: name_of[id(b)] for a, b in pairs}


def writes(node: fx.Node) -> bool:
    """Whether an op writes to memory that it was given, running statistics among it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    if schema.name in _UPDATING:
        statistics, training = node.args[3], node.args[5]
        return statistics is not None and bool(training)
    return schema.is_mutable


_UPDATING = ("aten::batch_norm", "aten::instance_norm")
"""Ops that update the statistics that they are given, in training."""
