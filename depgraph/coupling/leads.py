"""Which atoms may be cut differently for each unit of another: head dims, one choice a head.

A view makes all heads lose equally many dims, not the same ones. Where an atom is nowhere without
the atom that leads it, and nothing adds one head's dims to another's, each unit of the leading one
may keep its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from depgraph.coupling.axes import Atom, Axis, Concat, axis_atoms
from depgraph.coupling.groups import Group
from depgraph.coupling.propagate import Axes, Propagation, arguments, op_name
from depgraph.errors import DepgraphError
from depgraph.plan import check_units

_KEEP_PLACES = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"),
        *("permute", "transpose", "swapaxes", "swapdims", "t", "movedim", "cat"),
        *("unbind", "select", "split", "split_with_sizes", "chunk", "tensor_split"),
        *("clone", "contiguous", "detach", "alias", "to", "_to_copy", "dropout"),
        *("add", "sub", "mul", "div", "neg"),
    )
)
_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention")


def find_leads(p: Propagation) -> dict[Atom, Atom]:
    """The leading atom of each atom that may be cut differently for each of its units.

    Parameters
    ----------
    p : Propagation
        After its run.

    Returns
    -------
    dict of Atom to Atom
        ``head_dim -> heads``. Left out: what is rotated in pairs, goes through a norm of its own,
        does not follow its leading atom directly (``heads x 3 x head_dim``), or goes
        through any op for which it is not known to be safe.
    """
    found: dict[Atom, set[Atom | None]] = {}
    for node in p.trace.tensors.values():
        for axis in p.axes(node):
            for lead, atom in _neighbours(axis, None):
                found.setdefault(atom, set()).add(lead)
    leads = {
        atom: lead
        for atom, befores in found.items()
        if atom.frozen is None and len(befores) == 1 and (lead := next(iter(befores))) is not None
    }
    for node in p.trace.nodes:
        axes = _all_axes(p, node)
        for atom in {atom for axis in axes for atom in axis_atoms(axis)} & leads.keys():
            if not _goes_along(p, node, atom, leads[atom]):
                del leads[atom]
        for operand in node.all_input_nodes:
            for atom in {a for axis in p.axes(operand) for a in axis_atoms(axis)} & leads.keys():
                if not _reads_apart(p, node, atom, leads[atom]):
                    del leads[atom]
    return leads


def _neighbours(axis: Axis, before: Atom | None) -> Iterator[tuple[Atom | None, Atom]]:
    """Each atom of an axis with the one before it in its product."""
    for factor in axis:
        if isinstance(factor, Concat):
            for part in factor.parts:
                yield from _neighbours(part, before)
            before = None
        else:
            yield before, factor
            before = factor


def _all_axes(p: Propagation, node: fx.Node) -> Axes:
    return p.axes(node) or [axis for result in p.results(node) for axis in result]


def _goes_along(p: Propagation, node: fx.Node, atom: Atom, lead: Atom) -> bool:
    """Whether a value that has an atom has its leading one too."""
    results = [p.axes(node)] if p.axes(node) else p.results(node)
    held = [{a for axis in axes for a in axis_atoms(axis)} for axes in results]
    return all(lead in atoms for atoms in held if atom in atoms)


def _reads_apart(p: Propagation, node: fx.Node, atom: Atom, lead: Atom) -> bool:
    """Whether an op on values with an atom never brings two units of its leading one together."""
    name = op_name(node).removeprefix("aten.").rstrip("_")
    if name in _KEEP_PLACES or name == "getitem":
        return True
    a = arguments(node)
    if name == "linear":
        # all of it is summed at once, or the weight writes it
        along = [axis for axis in p.axes(a["input"])[:-1] if atom in axis_atoms(axis)]
        return not along
    if name in _PRODUCTS:
        # the leading atom counts the products
        ends = [axis for x in node.all_input_nodes for axis in p.axes(x)[-2:]]
        return not any(lead in axis_atoms(axis) for axis in ends)
    return False


def has_rows(units: Any) -> bool:
    """Whether kept units are said in rows, one for each unit of a leading group."""
    if isinstance(units, Tensor):
        return units.dim() == 2
    return len(units) > 0 and hasattr(units[0], "__len__")


def check_rows(group: Group, lead: Group | None, units: Any) -> tuple[tuple[int, ...], ...]:
    """The units to keep of a group for each unit of its leading one, ascending in each row.

    Parameters
    ----------
    group : Group
    lead : Group or None
        None where the group has none.
    units : sequence of sequence of int, or Tensor (lead.size, kept)

    Returns
    -------
    tuple of tuple of int

    Raises
    ------
    DepgraphError
        When there is no leading group, or the rows are not as many as it has units, or of different
        lengths, or one of them names units that there are not.
    """
    if lead is None:
        raise DepgraphError(
            f"group '{group.name}' takes one row of units to keep: no part of it may keep its own"
        )
    if len(units) != lead.size:
        raise DepgraphError(
            f"group '{group.name}' takes {lead.size} rows of units to keep, one for each unit of "
            f"'{lead.name}', not {len(units)}"
        )
    rows = tuple(check_units(group.name, group.size, row) for row in units)
    if len({len(row) for row in rows}) > 1:
        raise DepgraphError(
            f"group '{group.name}': each unit of '{lead.name}' has to keep equally many"
        )
    return rows
