"""Sizes in a generated forward: numbers of the plan, and what its inputs say at run time."""

from __future__ import annotations

from collections.abc import Mapping
from operator import floordiv, mul

from torch import fx

from depgraph.axes import Atom, Axis, axis_size
from depgraph.propagate import Propagation
from depgraph.work import batch_atoms

_Place = tuple[fx.Node, int]


class Sizes:
    """Writes sizes into a graph.

    Parameters
    ----------
    graph : fx.Graph
        In the making.
    p : Propagation
    sizes : mapping of Atom to int
        Of the plan.
    """

    def __init__(self, graph: fx.Graph, p: Propagation, sizes: Mapping[Atom, int]) -> None:
        self._graph = graph
        self._p = p
        self._sizes = sizes
        self._batch = batch_atoms(p)
        self._runs: dict[Axis, _Place] = {}
        # where a dimension is the batch times something else: windows, say
        self._times_batch: dict[Atom, tuple[fx.Node, int, int]] = {}

    def note(self, node: fx.Node, placeholder: fx.Node) -> None:
        """What an input's sizes are the sizes of."""
        for dim, axis in enumerate(self._p.axes(node)):
            if axis and all(isinstance(factor, Atom) and factor.frozen for factor in axis):
                self._runs.setdefault(axis, (placeholder, dim))
            for atom in self._batch:
                rest = tuple(factor for factor in axis if factor is not atom)
                fixed = axis_size(rest, self._sizes)
                if len(rest) == len(axis) - 1 and fixed:
                    self._times_batch.setdefault(atom, (placeholder, dim, fixed))

    def of(self, axis: Axis) -> int | fx.Node:
        """Size of an axis: a number, or an expression of the inputs' sizes."""
        fixed, i = 1, 0
        result: fx.Node | None = None
        while i < len(axis):
            size, count = self._free(axis[i:])
            if size is None:
                fixed *= axis_size(axis[i : i + 1], self._sizes)
            else:
                result = size if result is None else self._call(mul, result, size)
            i += count
        if result is None:
            return fixed
        return result if fixed == 1 else self._call(mul, result, fixed)

    def _free(self, axis: Axis) -> tuple[fx.Node | None, int]:
        """The size of as many leading factors as an input says at once, and how many these are."""
        for count in range(len(axis), 0, -1):
            if axis[:count] in self._runs:
                return self._graph.call_method("size", self._runs[axis[:count]]), count
        first = axis[0]
        if not isinstance(first, Atom) or first not in self._times_batch:
            return None, 1
        source, dim, rest = self._times_batch[first]
        whole = self._graph.call_method("size", (source, dim))
        return self._call(floordiv, whole, rest), 1

    def _call(self, function: object, left: fx.Node, right: fx.Node | int) -> fx.Node:
        return self._graph.call_function(function, (left, right))  # type: ignore[arg-type]
