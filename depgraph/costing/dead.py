"""Modules whose results nobody needs once groups are emptied: the norm of an empty branch, say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from depgraph.costing.cost import value_shape
from depgraph.coupling.axes import Atom, same
from depgraph.coupling.propagate import Propagation
from depgraph.tracing.blocks import writes
from depgraph.tracing.calls import ModuleCall


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


def find_dead_in_modes(
    modes: Sequence[Propagation], emptied: Iterable[Atom]
) -> dict[Propagation, Dead]:
    """For the walk of each mode, what is dead there, of the modules that no mode needs."""
    emptied = frozenset(emptied)
    dead = {p: find_dead(p, emptied) for p in modes}
    every = [found.modules for found in dead.values()]
    needed = frozenset().union(*every) - frozenset.intersection(*every)
    return {p: find_dead(p, emptied, needed) for p in modes} if needed else dead


def find_dead(
    p: Propagation, emptied: Iterable[Atom], needed_elsewhere: Collection[str] = ()
) -> Dead:
    """The modules with parameters of their own that compute nothing anyone needs.

    Parameters
    ----------
    p : Propagation
        After its run.
    emptied : iterable of Atom
        Of which no unit is left.
    needed_elsewhere : collection of str
        Modules that stay.

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
        made = {node for call in calls for node in p.trace.nodes[call.start : call.end]}
        if not name or name in needed_elsewhere or not made.isdisjoint(needed):
            continue
        if not all(_passes_on(p, c) for c in calls):
            continue
        own = {key: node for key, node in p.trace.tensors.items() if key.startswith(f"{name}.")}
        if own and all(node.users.keys() <= made for node in own.values()):
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


def _passes_on(p: Propagation, call: ModuleCall) -> bool:
    """Whether a call takes one tensor alone, and gives one with the same dimensions and type."""
    if call.kwargs or len(call.args) != 1:
        return False
    given, output = call.args[0], call.output
    if not isinstance(given, fx.Node) or not isinstance(output, fx.Node):
        return False
    before, after = p.axes(given), p.axes(output)
    alike = len(before) == len(after) and all(map(same, before, after))
    return alike and given.meta["val"].dtype == output.meta["val"].dtype
