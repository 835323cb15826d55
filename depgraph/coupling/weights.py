"""Freezes what weights are normalised over: to remove a unit there would change those that stay.

A layer computes with ``f(w)`` in place of ``w``: ``w / |w|``, a weight norm, a spectral norm, a
standardised weight. To switch a unit off is to make its activation zero, and every weight that
stays has its value; for ``f`` of fewer weights that does not hold. A norm of activations is another
thing: it takes its statistics over what is kept, and so does one of tokens that are parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from depgraph.coupling.axes import axis_atoms
from depgraph.coupling.propagate import Propagation, arguments, find_rule, op_name
from depgraph.coupling.rules.reduce import reduced_dims, statistic, total
from depgraph.coupling.vanish import summed
from depgraph.tracing.trace import shape

_NORMS = ("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
_SUMS = ("aten.add", "aten.sub")
_JOINS = ("aten.cat", "aten.concat", "aten.concatenate", "aten.stack")


def freeze_normalised_weights(p: Propagation) -> None:
    """Freeze every dimension that is reduced within the making of a weight.

    Parameters
    ----------
    p : Propagation
        Of a whole model, after its run.

    Notes
    -----
    What is made of parameters alone is a weight where it meets an activation. It is none where a
    layer takes it for its input (a table of positions, learned tokens), and none where it is laid
    beside an activation; the result of a norm may be added to one, too.
    """
    active = _active(p)
    streams = {atom for node in active for axis in p.axes(node) for atom in axis_atoms(axis)}
    for node in p.trace.nodes:
        if node.op != "call_function" or node in active:
            continue
        reduced = {
            atom: is_product
            for operand, dim, is_product in _reduces(node)
            for atom in axis_atoms(p.axes(operand)[dim])
            if atom.frozen is None
        }
        met = list(_meets(node, active)) if reduced else []
        shared = streams | {atom for x in met for axis in p.axes(x) for atom in axis_atoms(axis)}
        for atom, is_product in reduced.items():
            # not the rank of ``w + b a``, which is a dimension of no activation
            if met and (atom in shared or not is_product):
                reason = f"{p.label(node)} normalises a weight over it"
                p.algebra.freeze((atom,), reason)


def _active(p: Propagation) -> set[fx.Node]:
    """Nodes that are computed from an input."""
    active = set(p.trace.inputs)
    for node in p.trace.nodes:
        if node.op == "call_function" and not active.isdisjoint(node.all_input_nodes):
            active.add(node)
    return active


def _reduces(node: fx.Node) -> Iterator[tuple[fx.Node, int, bool]]:
    """What an op reduces: a value, one of its dimensions, and whether in a product of several.

    Not what a layer sums over: there one weight meets its input.
    """
    name, a = op_name(node), arguments(node)
    if name in _NORMS:
        x = a["input"]
        first = len(shape(x)) - len(a["normalized_shape"])
        yield from ((x, dim, False) for dim in range(first, len(shape(x))))
    elif name == "aten.group_norm":
        yield a["input"], 1, False
    elif name == "aten._weight_norm":
        v, g = a["v"], a["g"]
        single = shape(g) if len(shape(g)) == len(shape(v)) else (1,) * len(shape(v))
        yield from ((v, dim, False) for dim, size in enumerate(single) if size == 1)
    elif find_rule(node) in (total, statistic) and len(node.all_input_nodes) == 1:
        x = node.all_input_nodes[0]
        yield from ((x, dim, False) for dim in reduced_dims(node))
    elif _layer_input(node) is None:
        for places in summed(node):
            yield from ((x, dim, True) for x, dim in places)


def _layer_input(node: fx.Node) -> fx.Node | None:
    """What a layer takes for its input; None for what is no layer."""
    name = op_name(node)
    if name == "aten.linear" or name.startswith("aten.conv"):
        x: fx.Node = node.all_input_nodes[0]
        return x
    return None


def _meets(node: fx.Node, active: set[fx.Node]) -> Iterator[fx.Node]:
    """What is made of a reduction, wherever it is a weight of an activation, or given back."""
    added = (*_JOINS, *_SUMS) if op_name(node) in _NORMS else _JOINS
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            if user.op == "output":
                yield value
            elif user in active:
                if op_name(user).rstrip("_") not in added:
                    yield value
            elif _layer_input(user) is not value and user not in seen:
                seen.add(user)
                stack.append(user)
