"""Which groups keep multiples of some number of units, as kernels want rows of so many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, lcm

from torch import fx

from depgraph.coupling.axes import Atom, Axis, axis_atoms, axis_size
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.tracing.shapes import GROUPED_DTYPES, ROW_BYTES


@dataclass(frozen=True)
class Aligned:
    """An axis that keeps a multiple of some number of indices, and why."""

    axis: Axis
    multiple: int
    reason: str


def aligned_axes(p: Propagation) -> tuple[Aligned, ...]:
    """The axes of a trace whose rows a kernel wants in multiples of bytes.

    Parameters
    ----------
    p : Propagation
        After its run.

    Returns
    -------
    tuple of Aligned

    Notes
    -----
    A product by groups (``torch.nn.functional.grouped_mm``) wants rows of multiples of 16 bytes. A
    model may be moved to another type after a cut: rows keep what suits every type in which the
    original runs.
    """
    return tuple(
        aligned
        for node in p.trace.nodes
        if node.op == "call_function" and op_name(node) == "aten._grouped_mm"
        for aligned in _rows(p, node)
    )


def _rows(p: Propagation, node: fx.Node) -> Iterator[Aligned]:
    widest = ROW_BYTES // min(dtype.itemsize for dtype in GROUPED_DTYPES)
    reason = f"{p.label(node)} takes rows in multiples of {ROW_BYTES} bytes"
    for x in (arguments(node)["self"], arguments(node)["mat2"]):
        row = p.axes(x)[-1 if x.meta["val"].stride()[-1] == 1 else -2]
        yield Aligned(row, gcd(axis_size(row), widest), reason)


def multiples(aligned: tuple[Aligned, ...]) -> dict[Atom, int]:
    """Of how many units each atom has to keep a multiple, for all axes to come out right."""
    found: dict[Atom, int] = {}
    for item in aligned:
        for atom in set(axis_atoms(item.axis)):
            if atom.frozen is None:
                found[atom] = lcm(found.get(atom, 1), _multiple(item, atom))
    return found


def _multiple(item: Aligned, atom: Atom) -> int:
    """What of the multiple the factors beside the atom do not bring by themselves."""
    others = [f for f in item.axis if f is not atom]
    if len(others) == len(item.axis):  # a part of a concatenation
        return item.multiple
    whole = [f.size for f in others if isinstance(f, Atom) and f.frozen]
    brought = 1
    for size in whole:
        brought *= size
    return item.multiple // gcd(item.multiple, brought)


def unaligned(aligned: tuple[Aligned, ...], sizes: Mapping[Atom, int]) -> Aligned | None:
    """The first axis that does not come out as a multiple when atoms have these sizes."""
    return next((a for a in aligned if axis_size(a.axis, sizes) % a.multiple), None)
