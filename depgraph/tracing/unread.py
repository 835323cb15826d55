"""Leaves out of a recorded forward what nothing in the model reads, and keeps it aside.

A norm whose result is dropped runs all the same: it has to fit what it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import fx

from depgraph.tracing.blocks import mapped, writes
from depgraph.tracing.calls import ModuleCall
from depgraph.tracing.calls import Unread as NobodyReads


def alive_nodes(nodes: Sequence[fx.Node], last: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that these depend on, placeholders, and what writes to memory."""
    alive = set(last)
    for node in last:
        alive.update(node._input_nodes)
    for node in reversed(nodes):
        if node in alive or node.op == "placeholder" or writes(node):
            alive.add(node)
            alive.update(node._input_nodes)
    return alive


@dataclasses.dataclass(frozen=True)
class Unread:
    """A whole recorded forward, in a graph of its own.

    Attributes
    ----------
    nodes : tuple of fx.Node
    copies : mapping of fx.Node to fx.Node
        Its node for each of those of the recorded graph.
    owner : mapping of fx.Node to str
        The module that ran each of its nodes.
    """

    nodes: tuple[fx.Node, ...]
    copies: Mapping[fx.Node, fx.Node]
    owner: Mapping[fx.Node, str]


def with_unread(nodes: Sequence[fx.Node], calls: Iterable[ModuleCall]) -> Unread:
    """A copy of a recorded forward that outlives what is left out of the graph."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    owner = owners(nodes, calls)
    return Unread(
        tuple(copies.values()), copies, {copies[node]: name for node, name in owner.items()}
    )


def owners(nodes: Sequence[fx.Node], calls: Iterable[ModuleCall]) -> dict[fx.Node, str]:
    """The innermost module that ran each node."""
    owner: dict[fx.Node, str] = {}
    for call in sorted(calls, key=lambda call: call.depth):
        owner.update((node, call.name) for node in nodes[call.start : call.end])
    return owner


def without_unread(
    calls: Iterable[ModuleCall], nodes: Sequence[fx.Node], alive: set[fx.Node]
) -> list[ModuleCall]:
    """Calls in terms of the nodes that are alive alone."""
    place = [0, *accumulate(node in alive for node in nodes)]

    def read(value: Any) -> Any:
        if not isinstance(value, fx.Node) or value in alive:
            return value
        tensor = value.meta["val"]
        return NobodyReads(tuple(tensor.shape), tensor.dtype)

    return [
        dataclasses.replace(
            call,
            start=place[call.start],
            end=place[call.end],
            args=mapped(call.args, read),
            kwargs=mapped(call.kwargs, read),
            output=mapped(call.output, read),
            after=mapped(call.after, read),
        )
        for call in calls
    ]
