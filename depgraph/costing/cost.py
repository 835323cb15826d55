"""What a model costs when its atoms have other sizes: no forward is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from torch import fx

from depgraph.coupling.axes import Atom, axis_size
from depgraph.coupling.propagate import Propagation
from depgraph.tracing.trace import shape


def total_params(p: Propagation, names: Iterable[str], sizes: Mapping[Atom, int]) -> int:
    """Number of scalars in these parameters, tied ones once."""
    return sum(
        prod(axis_size(axis, sizes) for axis in p.axes(p.trace.tensors[name])) for name in names
    )


def value_shape(p: Propagation, node: fx.Node, sizes: Mapping[Atom, int]) -> tuple[int, ...]:
    """Shape that a value has when the atoms have these sizes."""
    axes = p.axes(node)
    return tuple(axis_size(axis, sizes) for axis in axes) if axes else shape(node)
