"""What a model runs besides the traced forward: its other mode, and ops whose results are dropped.

An auxiliary head that only training runs, or a norm whose result nobody returns, reads the same
activations, and has to fit them after a cut. So these forwards are walked in terms of the atoms of
the first one; what they alone hold stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from depgraph.coupling.axes import Atom, axis_atoms, axis_size
from depgraph.coupling.mode_couplings import couples_alike, parts_couple_alike
from depgraph.coupling.other_calls import runs_alike
from depgraph.coupling.propagate import Propagation, op_name
from depgraph.coupling.vanish import freeze_mixed_sums
from depgraph.coupling.weights import freeze_normalised_weights
from depgraph.tracing.modules import structural_copy
from depgraph.tracing.recorder import Recorder
from depgraph.tracing.trace import Trace, TraceError, shape, trace_forward


def other_modes(model: nn.Module, traced: Trace) -> tuple[Trace, ...]:
    """Traces of a model in the modes in which it may couple other dimensions.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    traced : Trace
        Of it, in its own mode.

    Returns
    -------
    tuple of Trace
        None of a mode in which the model does not run with these inputs.
    """
    if parts_couple_alike(traced, model):
        return ()
    found = []
    for training in (False, True):
        if set(traced.modes.values()) == {training}:
            continue
        copy = structural_copy(model)
        copy.train(training)  # which need not give the model back
        try:
            other = trace_forward(copy, *traced.example)
        except TraceError:
            continue
        if not couples_alike(traced, other):
            found.append(other)
    return tuple(found)


def other_branches(model: nn.Module, traced: Trace) -> tuple[Trace, ...]:
    """Traces of a model where what it asks of its inputs is answered the other way.

    A mask of ones may be skipped, and another one not: what the model does with it then has to fit
    a cut as well.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    traced : Trace
        Of it.

    Returns
    -------
    tuple of Trace
        One for each line of code that asks; none where the model does not run then, as after a
        check that fails.
    """
    asked = Counter(read.where for read in traced.reads if read.where and read.inputs)
    found = []
    args, kwargs = traced.example
    for where, times in asked.items():
        try:
            found.append(
                trace_forward(model, args, kwargs, partial(Recorder, turned={where: times}))
            )
        except TraceError:
            continue
    return tuple(found)


def walk(
    traced: Trace, others: Sequence[Trace] = (), branches: Sequence[Trace] = ()
) -> tuple[tuple[Propagation, ...], tuple[Propagation, ...]]:
    """The walk over a trace, and over all that runs besides, in terms of the same atoms.

    Parameters
    ----------
    traced : Trace
    others : sequence of Trace
        Of the same model, in other modes and at other calls.
    branches : sequence of Trace
        See `other_branches`.

    Returns
    -------
    in_modes : tuple of Propagation
        That of the trace, and one for each of the others that runs other ops.
    aside : tuple of Propagation
        Of the branches, and of the forwards with the ops whose results nobody reads, where there
        are some.
    """
    called = {call.name for trace in (traced, *others, *branches) for call in trace.calls}
    p = Propagation(traced, called=called)
    p.run()
    others = [trace for trace in others if not runs_alike(p, trace)]
    in_modes = (p, *(_walk_again(p, trace, Propagation) for trace in others))
    complete = [q.trace.complete for q in in_modes if q.trace.complete is not None]
    aside = tuple(_walk_again(p, trace, UnreadOps) for trace in complete)
    turned = tuple(_walk_again(p, trace, Propagation) for trace in branches)
    for q in (*in_modes, *turned):
        _freeze_hooked(q)
        freeze_normalised_weights(q)
        freeze_mixed_sums(q)
    _freeze_unread(p)
    return in_modes, (*turned, *aside)


class UnreadOps(Propagation):
    """A walk over ops that have to run after a cut, whatever comes of them."""

    def freeze(self, node: Any, reason: str, dims: Sequence[int] | None = None) -> None:
        """Leave alone what would only change a result."""


def _walk_again(p: Propagation, trace: Trace, kind: type[Propagation]) -> Propagation:
    seeds = {node: p.axes(p.trace.tensors[name]) for name, node in trace.tensors.items()}
    for node, known in zip(trace.inputs, p.trace.inputs, strict=True):
        seeds[node] = [  # of a call with other sizes, which are as fixed as those of the example
            axis if axis_size(axis) == size else p.algebra.new(size, f"dimension {dim} of a call")
            for dim, (axis, size) in enumerate(zip(p.axes(known), shape(node), strict=True))
        ]
    q = kind(trace, seeds, p.algebra)
    q.run()
    return q


def _freeze_hooked(p: Propagation) -> None:
    """Keep whole what a hook may change that is not part of the trace."""
    for name, place in p.trace.hooked.items():
        for call in p.trace.calls_of.get(name, ()):
            changed = {"args": (call.args, call.kwargs), "output": call.output}
            given = changed.get(place, tuple(changed.values()))
            for node in pytree.tree_leaves(given):
                if isinstance(node, fx.Node):
                    p.freeze(node, f"a hook of '{name}' may change it")


_PICKING = frozenset(
    f"aten.{name}"
    for name in (
        *("slice", "narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split"),
        *("unbind", "index", "index_select", "diagonal"),
    )
) | {"getitem"}
"""Ops that leave entries out of their results."""


def _freeze_unread(p: Propagation) -> None:
    """Keep whole what is a dimension of nothing but weights that nothing reads.

    Whole parameters, and entries that a forward leaves out: positions of a longer sequence, say.
    """
    inputs, tensors = set(p.trace.inputs), p.trace.tensors
    from_inputs: set[fx.Node] = set()
    read: set[Atom] = set()
    for node in p.trace.nodes:
        of_operands = set().union(*(_atoms(p, x) for x in node.all_input_nodes))
        if node in inputs or not from_inputs.isdisjoint(node.all_input_nodes):
            from_inputs.add(node)
            read |= of_operands | _atoms(p, node)
        elif node.op == "call_function" and op_name(node) not in _PICKING:
            read |= of_operands - _atoms(p, node)  # summed over
    for name, node in tensors.items():
        own = tuple(atom for axis in p.axes(node) for atom in axis_atoms(axis) if atom not in read)
        of = f"'{name}'" if not node.users else f"these entries of '{name}'"
        p.algebra.freeze(own, f"nothing that the traced forward returns depends on {of}")


def _atoms(p: Propagation, node: fx.Node) -> set[Atom]:
    results = [p.axes(node)] if p.axes(node) else p.results(node)
    return {atom for axes in results for axis in axes for atom in axis_atoms(axis)}
