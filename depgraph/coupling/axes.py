"""What a dimension is made of: a product of atoms and concatenations, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

_ages = count()


@dataclass(eq=False)
class Atom:
    """An indivisible factor of a dimension.

    Attributes
    ----------
    size : int
        Number of indices, at least 2.
    frozen : str or None
        Why no index of it may be removed; None when they may.
    bound : Axis or None
        What the atom was found to be equal to; None for a root.
    age : int
        Grows from atom to atom; of two that are equal the older one stays the root.
    """

    size: int
    frozen: str | None = None
    bound: Axis | None = None
    age: int = field(default_factory=_ages.__next__)

    def __repr__(self) -> str:
        return f"<{self.size}{'!' if self.frozen else ''}>"


@dataclass(frozen=True, eq=False)
class Concat:
    """Axes laid end to end along one dimension."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Number of indices."""
        return sum(axis_size(part) for part in self.parts)

    def __repr__(self) -> str:
        return "(" + " ++ ".join(map(str, self.parts)) + ")"


Factor = Atom | Concat
Axis = tuple[Factor, ...]
"""A product of factors, major first; the empty product is a dimension of size 1."""


def axis_size(axis: Axis, sizes: Mapping[Atom, int] | None = None) -> int:
    """Number of indices of a resolved axis, with some atoms at other sizes."""
    size = 1
    for factor in axis:
        if type(factor) is Atom:
            size *= factor.size if sizes is None else sizes.get(factor, factor.size)
        else:
            size *= factor_size(factor, sizes)
    return size


def factor_size(factor: Factor, sizes: Mapping[Atom, int] | None = None) -> int:
    """Number of indices of one factor, with some atoms at other sizes."""
    if isinstance(factor, Concat):
        return sum(axis_size(part, sizes) for part in factor.parts)
    return factor.size if sizes is None else sizes.get(factor, factor.size)


def axis_atoms(axis: Axis) -> Iterator[Atom]:
    """Atoms of a resolved axis, major first, with repetition."""
    for factor in axis:
        if isinstance(factor, Concat):
            for part in factor.parts:
                yield from axis_atoms(part)
        else:
            yield factor


def kept_indices(axis: Axis, kept: Mapping[Atom, Tensor]) -> Tensor:
    """Indices of the dimension that stay when each atom keeps the given units.

    Parameters
    ----------
    axis : Axis
        Resolved.
    kept : mapping from Atom to LongTensor
        Units kept, ascending; an atom left out keeps all. Of two dimensions: one row for each unit
        of the factor before the atom (``heads`` before ``head_dim``), which chooses for itself.

    Returns
    -------
    LongTensor
        Indices into the dimension, in its own order.
    """
    if len(axis) == 1 and isinstance(axis[0], Atom):  # most dimensions are one atom
        units = kept[axis[0]] if axis[0] in kept else torch.arange(axis[0].size)
        return units if units.dim() == 1 else units[0]
    return _kept_rows(axis, kept, torch.zeros(1, dtype=torch.long)).flatten()


def _kept_rows(axis: Axis, kept: Mapping[Atom, Tensor], before: Tensor) -> Tensor:
    """The indices kept of an axis once for each of the units that the factor before it keeps."""
    indices = torch.zeros(len(before), 1, dtype=torch.long)
    for factor in axis:
        if isinstance(factor, Concat):
            pieces, offset = [], 0
            for part in factor.parts:
                pieces.append(_kept_rows(part, kept, before) + offset)
                offset += axis_size(part)
            units = torch.cat(pieces, dim=1)
        else:
            units = kept[factor] if factor in kept else torch.arange(factor.size)
            units = units[before] if units.dim() > 1 else units.expand(len(before), -1)
        size, each = factor_size(factor), indices.shape[1] * units.shape[1]
        # spelled out: nothing may be left of what leads
        indices = (indices.reshape(-1, 1) * size + units).reshape(len(indices), each)
        before = units.flatten()
    return indices


def kept_sizes(kept: Mapping[Atom, Tensor]) -> dict[Atom, int]:
    """How many units each atom keeps."""
    return {atom: units.shape[-1] for atom, units in kept.items()}


def select_indices(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """A tensor's entries at these indices of some dimensions."""
    small = tensor.numel() <= _CACHED
    if len(indices) < 2 or 0 not in indices or small or tensor.is_meta:
        for dim, here in indices.items():
            tensor = tensor.index_select(dim, here)
        return tensor
    sizes = [len(indices[dim]) if dim in indices else n for dim, n in enumerate(tensor.shape)]
    out = tensor.new_empty(sizes)
    *inner, last = [dim for dim in indices if dim != 0]
    # A few rows at a time: what lies between two selections stays in the cache.
    rows = max(1, _CACHED * len(tensor) // max(1, tensor.numel()))
    for here, place in zip(indices[0].split(rows), out.split(rows), strict=True):
        part = tensor.index_select(0, here)
        for dim in inner:
            part = part.index_select(dim, indices[dim])
        torch.index_select(part, last, indices[last], out=place)
    return out


_CACHED = 1 << 18
"""Numbers that fit into a core's cache together."""


def unit_positions(axis: Axis, atom: Atom) -> Tensor:
    """Where each unit of an atom lies along a dimension.

    Parameters
    ----------
    axis : Axis
        Resolved.
    atom : Atom
        Occurs in the axis at least once.

    Returns
    -------
    LongTensor, shape (atom.size, k)
        Row ``u`` holds the indices of the dimension that belong to unit ``u``.
    """
    labels = _unit_labels(axis, atom)
    order = torch.argsort(labels, stable=True)
    return order[(labels < 0).sum() :].reshape(atom.size, -1)


def _unit_labels(axis: Axis, atom: Atom) -> Tensor:
    """Unit of ``atom`` at each index of the dimension, -1 where the index belongs to none."""
    labels = torch.full((1,), -1, dtype=torch.long)
    for factor in axis:
        if factor is atom:
            own = torch.arange(atom.size)
        elif isinstance(factor, Concat):
            own = torch.cat([_unit_labels(part, atom) for part in factor.parts])
        else:
            own = torch.full((factor.size,), -1, dtype=torch.long)
        labels = torch.maximum(labels[:, None], own).flatten()
    return labels


def same(left: Axis, right: Axis) -> bool:
    """Whether two resolved axes are the same product of the same atoms."""
    return len(left) == len(right) and all(map(_same_factor, left, right))


def _same_factor(f: Factor, g: Factor) -> bool:
    if isinstance(f, Concat) and isinstance(g, Concat):
        return len(f.parts) == len(g.parts) and all(map(same, f.parts, g.parts))
    return f is g
