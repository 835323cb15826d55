"""Which groups may lose all of their units: those whose values are only added up or passed on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from depgraph.axes import Atom, Axis, axis_atoms
from depgraph.cost import PRODUCTS
from depgraph.propagate import Propagation, arguments, find_rule, op_name

_ADDS_UP = PRODUCTS | {"aten.sum"}
_NORMS = {"aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm"}
_PASSES_ON = {
    "depgraph.rules.pointwise",
    "depgraph.rules.reshape",
    "depgraph.rules.create",
    "depgraph.rules.reduce",
}
"""Modules of the rules of ops that work on empty dims, as long as those stay in the result."""
_SELECTS = {
    *("aten.cat", "aten.concat", "aten.concatenate", "aten.stack", "aten.unbind", "aten.select"),
    *("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.glu", "aten.slice", "aten.narrow"),
    *("aten.index", "aten.index_select", "getitem"),
    *("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax"),
}
"""More such ops; what a softmax runs over is frozen anyway."""


def needs_a_unit(p: Propagation) -> dict[Atom, str]:
    """Why at least one unit of an atom has to stay, for those of which one has to.

    Parameters
    ----------
    p : Propagation
        After its run.

    Returns
    -------
    dict of Atom to str

    Notes
    -----
    A sum over nothing is zero, and so is what a matrix product makes of it: that is what the
    original computes with the units switched off. A mean or a norm over nothing has no value; torch
    has no convolution without channels, and other ops may end the process over one.
    """
    reasons: dict[Atom, str] = {}
    for node in p.trace.nodes:
        if node.op == "call_function":
            for axis in _over_nothing(p, node):
                for atom in axis_atoms(axis):
                    reasons.setdefault(atom, f"{p.label(node)} has no meaning without a unit")
    return reasons


def _over_nothing(p: Propagation, node: fx.Node) -> Iterator[Axis]:
    """Axes that an op cannot work on once they are empty."""
    name = op_name(node)
    if name in _ADDS_UP:
        return
    given = [axis for operand in node.all_input_nodes for axis in p.axes(operand)]
    made = [axis for axes in (p.axes(node), *p.results(node)) for axis in axes]
    if name in _NORMS:
        axes = p.axes(node.args[0])
        yield from axes[len(axes) - len(arguments(node)["normalized_shape"]) :]
    elif name in _SELECTS or getattr(find_rule(node), "__module__", "") in _PASSES_ON:
        left = {atom for axis in made for atom in axis_atoms(axis)}
        yield from (axis for axis in given if not left.issuperset(axis_atoms(axis)))
    else:
        yield from given + made
