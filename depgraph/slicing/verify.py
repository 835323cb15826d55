"""Traces a sliced model again and compares it with the prediction, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from depgraph.costing.cost import value_shape
from depgraph.coupling.attention import number_of
from depgraph.coupling.axes import Atom, axis_atoms, axis_size, kept_sizes
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.convolve import group_axis
from depgraph.errors import DepgraphError
from depgraph.rewriting.literals import (
    GROUPED,
    PARTING,
    RANGES,
    SIZE_ARGUMENTS,
    kept_range,
    range_of,
)
from depgraph.tracing.modules import named_modules
from depgraph.tracing.recorder import Recorder
from depgraph.tracing.retyped import as_traced
from depgraph.tracing.trace import Trace, TraceError, shape, trace_with

if TYPE_CHECKING:
    from depgraph.graph import DependencyGraph


class Mismatch(DepgraphError):
    """A module of the sliced model computes something else than the plan predicts."""

    def __init__(self, module: str, text: str, of_number: bool = False) -> None:
        super().__init__(text)
        self.module = module
        self.of_number = of_number


def verify(
    graph: DependencyGraph,
    small: nn.Module,
    kept: Mapping[Atom, Tensor],
    rescaled: Mapping[fx.Node, float] | None = None,
) -> None:
    """Prove that a sliced model runs the ops of the original at the predicted shapes.

    In the mode of the trace, and in the other one where that couples or runs anything else.

    Parameters
    ----------
    graph : DependencyGraph
        Of the original.
    small : nn.Module
        The sliced model.
    kept : mapping of Atom to LongTensor
        Units kept of each pruned atom.
    rescaled : mapping of fx.Node to float, optional
        Calls of the original that compute with another number (`depgraph.rescaling`).

    Raises
    ------
    Mismatch
        Naming the module and the groups, when an op, a shape or a number differs.

    Notes
    -----
    Every node is compared. Of blocks that are alike (the same code, attributes and children, and
    tensors and arguments that look the same) the trace runs one forward and repeats its nodes for
    the others: a forward is a function of these, so that they would give the same nodes. What
    cannot be compared is run, and a module that has changed by the end makes the trace start over.
    """
    for p in graph.in_modes:
        _verify_in_mode(graph, p, small, kept, rescaled or {})


def _verify_in_mode(
    graph: DependencyGraph,
    p: Propagation,
    small: nn.Module,
    kept: Mapping[Atom, Tensor],
    rescaled: Mapping[fx.Node, float],
) -> None:
    sizes = kept_sizes(kept)
    args, kwargs = p.trace.example
    modules = named_modules(small)
    modes = {name: module.training for name, module in modules.items()}
    for name, module in modules.items():
        module.training = p.trace.modes.get(name, module.training)
    try:
        grad = p.trace.calls_of[""][0].grad
        again = trace_with(as_traced(small, p.trace), args, kwargs, Recorder, grad)
    except TraceError as error:
        raise Mismatch(error.module, f"the sliced model does not run: {error}") from error
    finally:
        for name, module in modules.items():
            module.training = modes[name]
    dead = graph.dead(sizes, p)
    before = [node for node in computing(p.trace) if node not in dead.nodes]
    after = computing(again)
    for old, new in zip(before, after, strict=False):
        _compare(graph, p, old, new, kept, rescaled)
        _compare_held(p, again, old, new)
    if len(before) != len(after):
        raise Mismatch(
            "",
            f"the sliced model runs {len(after)} ops, the original {len(before)}; its forward "
            "depends on a size in a way the plan cannot follow",
        )
    for name in p.trace.tensors.keys() - dead.tensors:
        node = p.trace.tensors[name]
        expected = value_shape(p, node, sizes)
        if shape(again.tensors[name]) != expected:
            raise Mismatch(
                "", f"parameter '{name}' came out as {shape(again.tensors[name])}, not {expected}"
            )


def _compare_held(p: Propagation, again: Trace, old: fx.Node, new: fx.Node) -> None:
    """Tensors that no module has registered are the same: one made from a width is not."""
    held, found = ([x for x in node.all_input_nodes if x.op == "get_attr"] for node in (old, new))
    for one, other in zip(held, found, strict=False):
        first, second = p.trace.constants[str(one.target)], again.constants[str(other.target)]
        if first.is_meta or second.is_meta:
            continue
        if first.shape != second.shape or not torch.equal(first.cpu(), second.cpu()):
            module = p.trace.owner.get(old, "")
            raise Mismatch(module, f"module '{module}' makes a tensor from a pruned size")


def computing(trace: Trace) -> list[fx.Node]:
    """The calls that compute something of the outputs.

    A copy is made or not as a size happens to be 1, and a slice that takes all is none or an alias;
    a forward that was rewritten need not ask again what the original asked.
    """
    calls = (node for node in trace.nodes if node.op == "call_function")
    saved = ("aten.contiguous", "aten.alias")
    return [n for n in calls if op_name(n) not in saved and n not in trace.asking]


def _compare(
    graph: DependencyGraph,
    p: Propagation,
    old: fx.Node,
    new: fx.Node,
    kept: Mapping[Atom, Tensor],
    rescaled: Mapping[fx.Node, float],
) -> None:
    sizes = kept_sizes(kept)
    expected = value_shape(p, old, sizes)
    module = p.trace.owner.get(old, "")
    if kind(old) == kind(new) and shape(new) == expected:
        if not _same_numbers(p, old, new, kept, rescaled.get(old)):
            text = f"module '{module}' computes a number from a pruned size"
            raise Mismatch(module, text, of_number=True)
        return
    pruned = {group._atom: group.name for group in graph.prunable if group._atom in sizes}
    touched = {
        pruned[atom]
        for value in (old, *old.all_input_nodes)
        for axis in p.axes(value)
        for atom in axis_atoms(axis)
        if atom in pruned
    }
    names = sorted(touched) or ["the groups it works on"]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    raise Mismatch(
        module,
        f"module '{module}' does not follow the plan: {op_name(new)} "
        f"gives {shape(new)} where {op_name(old)} should give {expected}; keep all units of "
        f"{', '.join(names[:6])}{more}",
    )


def kind(node: fx.Node) -> str:
    """An op's name; one name for ops that stand in for each other in generated forwards."""
    name = op_name(node)
    return next((family[0] for family in (PARTING, RANGES) if name in family), name)


def _same_numbers(
    p: Propagation,
    old: fx.Node,
    new: fx.Node,
    kept: Mapping[Atom, Tensor],
    number: float | None = None,
) -> bool:
    """Whether numbers that no shape shows are those of the original, or those that the plan makes.

    A temperature by width, where a range starts, how many groups a convolution has, an axis's
    number that happens to equal a pruned size. A number that is given is the one to find.
    """
    name = op_name(old)
    if number is not None:
        return isclose(number_of(new) or 0, number, rel_tol=1e-9)
    if name in RANGES and p.axes(old.args[0]):
        start, _, step = kept_range(p, old, kept)
        found = range_of(new)
        if (start, step) != (found[0], found[2]) and shape(new)[arguments(new)["dim"]] > 0:
            return False
    if name in GROUPED:
        axis = group_axis(p, old)
        sizes = kept_sizes(kept)
        groups = axis_size(axis, sizes) if axis else arguments(old)[GROUPED[name]]
        if arguments(new)[GROUPED[name]] != groups:
            return False
    if _plain((old.args, old.kwargs)) == _plain((new.args, new.kwargs)):
        return name != _ATTENTION or isclose(number_of(old) or 0, number_of(new) or 0, rel_tol=1e-9)
    return numbers(old) == numbers(new)


_ATTENTION = "aten.scaled_dot_product_attention"


def _plain(value: Any) -> Any:
    """An argument without its tensors."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, fx.Node) else value


def numbers(node: fx.Node) -> list[Any]:
    """Arguments that are no tensors, without sizes, which the shape of the result tells."""
    name = op_name(node)
    a = arguments(node)
    if name in RANGES or name in PARTING:
        return [a["dim"]]
    if name == _ATTENTION:
        return [round(number_of(node) or 0, 9), a["dropout_p"], a["is_causal"]]
    sizes = (SIZE_ARGUMENTS.get(name), GROUPED.get(name), "device")
    return [_plain(value) for key, value in a.items() if key not in sizes]
