"""Which groups may lose all of their units: those whose values are only added up or passed on."""

from __future__ import annotations

from depgraph.coupling.axes import Atom, axis_atoms
from depgraph.coupling.propagate import Propagation, units_needed


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
    has no convolution without channels, and other ops may end the process over one. Which ops are
    which, their rules say.
    """
    reasons: dict[Atom, str] = {}
    for node in p.trace.nodes:
        if node.op == "call_function":
            for axis in units_needed(p, node):
                for atom in axis_atoms(axis):
                    reasons.setdefault(atom, f"{p.label(node)} has no meaning without a unit")
    return reasons
