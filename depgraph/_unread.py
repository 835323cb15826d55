"""Leaves out of a recorded forward what nothing in the model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from torch import fx

from depgraph._blocks import mapped, writes
from depgraph._calls import UNREAD, ModuleCall


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


def without_unread(
    calls: Iterable[ModuleCall], nodes: Sequence[fx.Node], alive: set[fx.Node]
) -> list[ModuleCall]:
    """Calls in terms of the nodes that are alive alone."""
    place = [0, *accumulate(node in alive for node in nodes)]

    def read(value: Any) -> Any:
        return UNREAD if isinstance(value, fx.Node) and value not in alive else value

    return [
        dataclasses.replace(
            call,
            start=place[call.start],
            end=place[call.end],
            args=mapped(call.args, read),
            kwargs=mapped(call.kwargs, read),
            output=mapped(call.output, read),
        )
        for call in calls
    ]
