from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from depgraph.coupling.algebra import Algebra
from depgraph.coupling.axes import (
    Atom,
    Axis,
    Concat,
    axis_atoms,
    axis_size,
    kept_indices,
    unit_positions,
)


def test_a_view_splits_a_dimension_everywhere_at_once() -> None:
    algebra = Algebra()
    width = algebra.new(24)
    twin = algebra.new(24)
    algebra.unify(width, twin, "add")
    heads, head_dim = algebra.regroup([width], [4, 6], "view")
    assert algebra.resolve(twin) == (*heads, *head_dim)


def test_merging_two_dimensions_and_splitting_them_again_gives_the_same_atoms() -> None:
    algebra = Algebra()
    a, b = algebra.new(4), algebra.new(6)
    (merged,) = algebra.regroup([a, b], [24], "view")
    assert algebra.regroup([merged], [4, 6], "view") == [a, b]


def test_a_concatenation_viewed_as_equal_parts_makes_the_parts_equal() -> None:
    algebra = Algebra()
    q, k, v = (algebra.new(12) for _ in range(3))
    joined = algebra.concat([q, k, v], "cat")
    _, heads, head_dim = algebra.regroup([joined], [3, 4, 3], "view")
    assert algebra.resolve(q) == algebra.resolve(k) == algebra.resolve(v) == (*heads, *head_dim)


def test_a_cut_through_one_atom_gives_parts_of_their_own() -> None:
    algebra = Algebra()
    width = algebra.new(10)
    left, right = algebra.take(width, 0, 4), algebra.take(width, 4, 10)
    assert left is not None and right is not None
    assert set(axis_atoms(left)).isdisjoint(axis_atoms(right))
    assert axis_size(algebra.resolve(width)) == 10


def test_two_views_that_do_not_fit_freeze_with_the_op_as_the_reason() -> None:
    algebra = Algebra()
    width = algebra.new(12)
    algebra.regroup([width], [3, 4], "view one")
    algebra.regroup([width], [4, 3], "view two")
    assert all("view two" in (atom.frozen or "") for atom in axis_atoms(algebra.resolve(width)))


def test_frozen_dimensions_take_two_views_without_conflict() -> None:
    algebra = Algebra()
    side, channels = algebra.new(56, "spatial"), algebra.new(32)
    algebra.regroup([side, channels], [8, 7, 32], "window")
    algebra.regroup([side, channels], [28, 2, 32], "merge")
    assert all(atom.frozen is None for atom in axis_atoms(algebra.resolve(channels)))


def test_parts_of_a_frozen_dimension_are_frozen_for_its_reason() -> None:
    algebra = Algebra()
    windows, tokens = algebra.regroup([algebra.new(24, "batch")], [4, 6], "view")
    assert [atom.frozen for atom in axis_atoms((*windows, *tokens))] == ["batch", "batch"]


def test_what_a_view_leaves_whole_is_not_frozen_with_what_it_mixes() -> None:
    algebra = Algebra()
    batch, side, width = algebra.new(5), algebra.new(6), algebra.new(8)
    algebra.regroup([side], [2, 3], "view one")
    mixed = algebra.regroup([batch, side, width], [5, 3, 16], "view two")
    assert mixed[0] == batch and mixed[2][-1:] == width
    assert [atom.frozen for atom in axis_atoms((*batch, *width))] == [None, None]
    assert all("view two" in str(atom.frozen) for atom in axis_atoms(algebra.resolve(side)))


def test_what_meets_a_frozen_dimension_is_frozen_for_the_same_reason() -> None:
    algebra = Algebra()
    free = algebra.new(8)
    algebra.unify(free, algebra.new(8, "classes"), "add")
    assert [atom.frozen for atom in axis_atoms(algebra.resolve(free))] == ["classes"]


@st.composite
def axes(draw: st.DrawFn, depth: int = 1) -> Axis:
    factors: list[Atom | Concat] = []
    for _ in range(draw(st.integers(1, 2))):
        if depth and draw(st.booleans()):
            parts = draw(st.lists(axes(depth=depth - 1), min_size=2, max_size=3))
            factors.append(Concat(tuple(parts)))
        else:
            factors.append(Atom(draw(st.integers(2, 3))))
    return tuple(factors)


def _alive(axis: Axis, dead: dict[Atom, set[int]]) -> list[bool]:
    """By enumeration: an index is alive when no atom's unit that it stands for is dead."""
    out = [True]
    for factor in axis:
        if isinstance(factor, Concat):
            own = [flag for part in factor.parts for flag in _alive(part, dead)]
        else:
            own = [unit not in dead.get(factor, ()) for unit in range(factor.size)]
        out = [a and b for a in out for b in own]
    return out


@given(axes(), st.randoms(use_true_random=False))
def test_kept_indices_are_those_that_no_dropped_unit_touches(axis: Axis, random) -> None:
    atoms = list(dict.fromkeys(axis_atoms(axis)))
    dead = {atom: set(random.sample(range(atom.size), atom.size - 1)) for atom in atoms[::2]}
    kept = {
        atom: torch.tensor([unit for unit in range(atom.size) if unit not in units])
        for atom, units in dead.items()
    }
    alive = _alive(axis, dead)
    assert kept_indices(axis, kept).tolist() == [i for i, flag in enumerate(alive) if flag]


@given(axes())
def test_positions_of_a_unit_are_the_indices_that_die_with_it(axis: Axis) -> None:
    atom = next(axis_atoms(axis))
    positions = unit_positions(axis, atom)
    for unit in range(atom.size):
        alive = _alive(axis, {atom: {unit}})
        assert sorted(positions[unit].tolist()) == [i for i, f in enumerate(alive) if not f]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_regrouping_keeps_the_order_of_elements(sizes: list[int], data: st.DataObject) -> None:
    algebra = Algebra()
    whole = algebra.new(prod(sizes))
    pieces = algebra.regroup([whole], sizes, "view")
    assert [axis_size(algebra.resolve(piece)) for piece in pieces] == sizes
    (again,) = algebra.regroup(pieces, [prod(sizes)], "view")
    assert algebra.resolve(again) == algebra.resolve(whole)
