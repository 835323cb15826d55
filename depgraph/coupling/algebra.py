"""Keeps axes equal by unification: atoms are bound to one another, or split in finer factors.

A dimension of 2304 may turn out to be ``3 x heads x head_dim``, or ``q ++ k ++ v``. Every axis that
mentions an atom sees its refinement at once, and nothing here depends on how wide a dimension is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from depgraph.coupling.axes import (
    Atom,
    Axis,
    Concat,
    Factor,
    axis_atoms,
    axis_size,
    factor_size,
    same,
)
from depgraph.coupling.runs import boundaries, join, runs


class Algebra:
    """The atoms of one trace and what has been found equal.

    Attributes
    ----------
    bindings : int
        Grows whenever an atom is bound: what was resolved at the same number still holds.

    Examples
    --------
    >>> algebra = Algebra()
    >>> width = algebra.new(768)
    >>> heads, head_dim = algebra.regroup([width], [12, 64], "view")
    >>> algebra.resolve(width)
    (<12>, <64>)
    """

    def __init__(self) -> None:
        self.bindings = 0
        self._selectors: dict[int, Atom] = {}

    def new(self, size: int, frozen: str | None = None) -> Axis:
        """A fresh axis of one atom; of none when the size is 1."""
        if size == 0:
            return (Atom(0, frozen or "empty"),)
        return (Atom(size, frozen),) if size > 1 else ()

    def resolve(self, axis: Axis) -> Axis:
        """The axis in terms of root atoms; concatenations of equal parts become products."""
        for factor in axis:
            if type(factor) is not Atom or factor.bound is not None:
                break
        else:
            return axis
        out: list[Factor] = []
        for factor in axis:
            if isinstance(factor, Concat):
                out.extend(self._resolve_concat(factor))
            elif factor.bound is None:
                out.append(factor)
            else:
                factor.bound = self.resolve(factor.bound)
                out.extend(factor.bound)
        return tuple(out)

    def _resolve_concat(self, concat: Concat) -> Axis:
        parts: list[Axis] = []
        for part in map(self.resolve, concat.parts):
            if len(part) == 1 and isinstance(part[0], Concat):
                parts.extend(part[0].parts)
            else:
                parts.append(part)
        parts = [part for part in parts if axis_size(part)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        if all(same(part, parts[0]) for part in parts[1:]):
            return (self.selector(len(parts)), *parts[0])
        return (Concat(tuple(parts)),)

    def selector(self, size: int) -> Atom:
        """The frozen atom that tells ``size`` equal parts of a dimension apart."""
        if size not in self._selectors:
            self._selectors[size] = Atom(size, f"tells {size} equal parts apart")
        return self._selectors[size]

    def _bind(self, atom: Atom, axis: Axis) -> Axis:
        atom.bound = axis
        self.bindings += 1
        return axis

    def freeze(self, axis: Axis, reason: str) -> None:
        """No unit of the axis may be removed; the first reason given is the one that stays."""
        for atom in axis_atoms(self.resolve(axis)):
            if atom.frozen is None:
                atom.frozen = reason

    def concat(self, parts: Sequence[Axis], reason: str) -> Axis:
        """Parts laid end to end; frozen parts only give one frozen atom, which stays whole."""
        parts = [self.resolve(part) for part in parts]
        if len(parts) == 1:
            return parts[0]
        if all(atom.frozen for part in parts for atom in axis_atoms(part)):
            return self.new(sum(axis_size(part) for part in parts), reason)
        return self.resolve((Concat(tuple(parts)),))

    def unify(self, left: Axis, right: Axis, why: str) -> None:
        """Make two axes of equal size the same, refining atoms where the other side is finer.

        Where no refinement makes them the same, both are frozen with ``why`` as the reason. Empty
        ones, of a model that was emptied before, have nothing to share.
        """
        a, b = list(self.resolve(left)), list(self.resolve(right))
        if axis_size(tuple(a)) == 0:
            return
        while a and b:
            if a[0] is b[0]:
                del a[0], b[0]
            elif factor_size(a[0]) == factor_size(b[0]):
                self._equate(a.pop(0), b.pop(0), why)
            elif not (self._refine(a, b) or self._refine(b, a)):
                break
            a, b = list(self.resolve(tuple(a))), list(self.resolve(tuple(b)))
        if a or b:
            self._freeze_both(tuple(a), tuple(b), f"{why}: its two sides cannot be matched")

    def _freeze_both(self, a: Axis, b: Axis, why: str) -> None:
        reasons = [atom.frozen for atom in axis_atoms((*a, *b)) if atom.frozen]
        self.freeze((*a, *b), reasons[0] if reasons else why)

    def _equate(self, f: Factor, g: Factor, why: str) -> None:
        if isinstance(f, Concat) and isinstance(g, Concat):
            self._equate_concats(f, g, why)
        elif isinstance(f, Concat):
            self._equate(g, f, why)
        elif isinstance(g, Atom):
            frozen = (bool(f.frozen), bool(g.frozen))
            older = f.age < g.age if frozen[0] == frozen[1] else frozen[0]
            root, child = (f, g) if older else (g, f)
            self._bind(child, (root,))
        elif f.frozen or f in axis_atoms((g,)):
            self._freeze_both((f,), (g,), why)
        else:
            self._bind(f, (g,))

    def _equate_concats(self, f: Concat, g: Concat, why: str) -> None:
        cuts = sorted({*boundaries(f.parts), *boundaries(g.parts)})
        left, right = self._cut(f, cuts), self._cut(g, cuts)
        if left is None or right is None:
            self._freeze_both((f,), (g,), f"{why}: its parts have other boundaries")
            return
        for part, other in zip(left, right, strict=True):
            self.unify(part, other, why)

    def _refine(self, coarse: list[Factor], fine: list[Factor]) -> bool:
        """Split the first coarse factor so that it starts with the first fine one."""
        size = factor_size(fine[0])
        pieces = self.split(coarse[0], size)
        if pieces is None:
            return False
        coarse[:1] = pieces
        return True

    def split(self, factor: Factor, major: int) -> Axis | None:
        """Factors equal to ``factor``, the first of them of size ``major``; None if impossible."""
        size = factor_size(factor)
        if major >= size or major < 2 or size % major:
            return None
        if isinstance(factor, Atom):
            why = factor.frozen  # of its parts as well
            return self._bind(factor, (*self.new(major, why), *self.new(size // major, why)))
        return self._split_concat(factor, major)

    def _split_concat(self, concat: Concat, major: int) -> Axis | None:
        """``q ++ k ++ v`` seen as ``3 x part``: possible when the parts can be made equal."""
        pieces = self._cut(concat, [concat.size // major * i for i in range(1, major)])
        if pieces is None:
            return None
        for piece in pieces[1:]:
            self.unify(pieces[0], piece, "view of a concatenation as equal parts")
        if not all(same(self.resolve(pieces[0]), self.resolve(piece)) for piece in pieces[1:]):
            return None
        return (self.selector(major), *self.resolve(pieces[0]))

    def take(self, axis: Axis, start: int, end: int) -> Axis | None:
        """The axis of ``dimension[start:end]``; None when it cannot be cut there."""
        axis = self.resolve(axis)
        size = axis_size(axis)
        if (start, end) == (0, size):
            return axis
        if len(axis) > 1:
            return self._take_parts(axis, start, end)
        pieces = self._cut(axis[0], [start, end])
        if pieces is None:
            return None
        cuts = [0, *sorted({start, end} - {0, size}), size]
        return self.resolve(pieces[cuts.index(start)])

    def _take_parts(self, axis: Axis, start: int, end: int) -> Axis | None:
        """Whole indices of the leading factor of a product."""
        lead, minor = axis[0], axis_size(axis[1:])
        if start % minor or end % minor:
            return None
        first, last = start // minor, end // minor
        if isinstance(lead, Atom) and lead.frozen:
            count = last - first
            return (*((self.selector(count),) if count > 1 else ()), *axis[1:])
        taken = self.take((lead,), first, last)
        return None if taken is None else self.resolve((*taken, *axis[1:]))

    def strided(self, axis: Axis, step: int) -> Axis | None:
        """The axis of ``dimension[i::step]``, for a step that divides the size; None otherwise.

        ``pairs x 2`` taken by twos is ``pairs``.
        """
        if axis_size(self.resolve(axis)) % step:
            return None
        dealt = self._deal(list(self.resolve(axis)), [axis_size(self.resolve(axis)) // step, step])
        if dealt is None:
            return None
        self.freeze(dealt[1], f"tells every one of {step} neighbours apart")
        return self.resolve(dealt[0])

    def _cut(self, factor: Factor, cuts: Sequence[int]) -> list[Axis] | None:
        """The factor cut at the given indices; its unfrozen atoms are split where a cut falls."""
        size = factor_size(factor)
        inner = sorted({cut for cut in cuts if 0 < cut < size})
        if isinstance(factor, Atom):
            if not inner:
                return [(factor,)]
            if factor.frozen:
                return None
            edges = [0, *inner, size]
            pieces = [self.new(b - a) for a, b in pairwise(edges)]
            self._bind(factor, (Concat(tuple(pieces)),))
            return pieces
        return self._cut_parts(factor.parts, inner)

    def _cut_parts(self, parts: Sequence[Axis], inner: Sequence[int]) -> list[Axis] | None:
        fine: list[Axis] = []
        offset = 0
        for part in parts:
            part = self.resolve(part)
            size = axis_size(part)
            local = [cut - offset for cut in inner if offset < cut < offset + size]
            if local:
                pieces = self._cut_product(part, local)
                if pieces is None:
                    return None
                fine.extend(pieces)
            else:
                fine.append(part)
            offset += size
        return join(fine, inner)

    def _cut_product(self, axis: Axis, cuts: Sequence[int]) -> list[Axis] | None:
        """A product cut between whole indices of its leading factor."""
        minor = axis_size(axis[1:])
        if any(cut % minor for cut in cuts):
            return None
        pieces = self._cut(axis[0], [cut // minor for cut in cuts])
        return None if pieces is None else [(*piece, *axis[1:]) for piece in pieces]

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int], why: str) -> list[Axis]:
        """Axes of a view: the factors of ``axes``, in order, dealt out to dimensions of ``sizes``.

        Where a dimension cuts through a factor that cannot be split, that factor and those mixed
        with it are frozen with ``why``; frozen atoms of their own stand in their place.
        """
        factors = [factor for axis in axes for factor in self.resolve(axis)]
        if 0 in sizes:
            return self._regroup_run(factors, list(sizes), why)
        out: list[Axis] = []
        for run, run_sizes in runs(factors, sizes):
            out.extend(self._regroup_run(run, run_sizes, why))
        return out

    def _regroup_run(self, run: list[Factor], sizes: list[int], why: str) -> list[Axis]:
        dealt = None if 0 in sizes else self._deal(list(run), sizes)
        if dealt is not None:
            return dealt
        for at in (0, -1):  # what is whole at either end is not mixed with the rest
            if 0 not in sizes and len(run) > 1 and sizes[at] % factor_size(run[at]) == 0:
                return self._around(run, sizes, at, why)
        reasons = [atom.frozen for atom in axis_atoms(self.resolve(tuple(run))) if atom.frozen]
        reason = reasons[0] if reasons else f"{why} cuts through it"
        self.freeze(tuple(run), f"{why} mixes it with: {reason}" if reasons else reason)
        return [self.new(size, reason) for size in sizes]

    def _around(self, run: list[Factor], sizes: list[int], at: int, why: str) -> list[Axis]:
        """A run with its first or last factor in the first or last dimension, as one of several."""
        rest = [*sizes]
        rest[at] //= factor_size(run[at])
        out = self._regroup_run(run[1:] if at == 0 else run[:-1], rest, why)
        out[at] = (run[0], *out[0]) if at == 0 else (*out[-1], run[-1])
        return out

    def _deal(self, factors: list[Factor], sizes: Sequence[int]) -> list[Axis] | None:
        out: list[Axis] = []
        for size in sizes:
            axis: list[Factor] = []
            while size > 1:
                head = factor_size(factors[0])
                if head > size:
                    pieces = self.split(factors[0], size)
                    if pieces is None:
                        return None
                    factors[:1] = pieces
                elif size % head:
                    return None
                else:
                    axis.append(factors.pop(0))
                    size //= head
            out.append(tuple(axis))
        return out
