"""Modules whose results nobody needs once groups are emptied: the norm of an empty branch, say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from depgraph._blocks import writes
from depgraph._calls import ModuleCall
from depgraph.axes import Atom, same
from depgraph.cost import value_shape
from depgraph.propagate import Propagation


@dataclass(frozen=True)
class Dead:
    """What goes with the groups that were emptied.

    Attributes
    ----------
    modules : frozenset of str
        Each gives a tensor like the one it takes, so that ``nn.Identity`` can stand in its place.
    nodes : frozenset of fx.Node
        What their calls compute.
    tensors : frozenset of str
        Their parameters and buffers.
    """

    modules: frozenset[str] = frozenset()
    nodes: frozenset[fx.Node] = frozenset()
    tensors: frozenset[str] = frozenset()


def find_dead(p: Propagation, emptied: Iterable[Atom]) -> Dead:
    """The modules with parameters of their own that compute nothing anyone needs.

    Parameters
    ----------
    p : Propagation
        After its run.
    emptied : iterable of Atom
        Of which no unit is left.

    Returns
    -------
    Dead

    Notes
    -----
    A value without elements needs none of the values it was computed from: nothing before the
    first layer of an empty branch reaches the output.
    """
    needed = _needed(p, emptied)
    modules: set[str] = set()
    nodes: set[fx.Node] = set()
    tensors: set[str] = set()
    for name, calls in sorted(p.trace.calls_of.items()):  # what holds others before them
        if any(name.startswith(f"{outer}.") for outer in modules):
            continue
        own = {key: node for key, node in p.trace.tensors.items() if key.startswith(f"{name}.")}
        made = {node for call in calls for node in p.trace.nodes[call.start : call.end]}
        used = {user for node in own.values() for user in node.users}
        if name and own and made.isdisjoint(needed) and used <= made and _pass_on(p, calls):
            modules.add(name)
            nodes |= made
            tensors |= own.keys()
    return Dead(frozenset(modules), frozenset(nodes), frozenset(tensors))


def _needed(p: Propagation, emptied: Iterable[Atom]) -> set[fx.Node]:
    """Nodes on whose values the outputs depend."""
    sizes = dict.fromkeys(emptied, 0)
    needed = {p.trace.nodes[-1]}
    for node in reversed(p.trace.nodes):
        if node in needed or writes(node):
            needed.add(node)
            if 0 not in value_shape(p, node, sizes):
                needed.update(node.all_input_nodes)
    return needed


def _pass_on(p: Propagation, calls: Iterable[ModuleCall]) -> bool:
    """Whether each call takes one tensor alone, and gives one with the same dimensions and type."""
    for call in calls:
        given = (*call.args, *call.kwargs.values())
        if len(given) != 1 or call.kwargs or not isinstance(given[0], fx.Node):
            return False
        if not isinstance(call.output, fx.Node):
            return False
        before, after = p.axes(given[0]), p.axes(call.output)
        if len(before) != len(after) or not all(map(same, before, after)):
            return False
        if given[0].meta["val"].dtype != call.output.meta["val"].dtype:
            return False
    return True
