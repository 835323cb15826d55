"""Tells whether a model runs the same ops in training as in evaluation, without running it again.

Its forward can differ only through a module that reads its mode. Where each of these, called as it
was in the trace, runs the same ops in both modes, whatever called it gets the same, and the whole
does too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph._calls import UNREAD, ModuleCall
from depgraph._modules import structural_copy
from depgraph._watch import ready_to_watch
from depgraph.rules.pointwise import drops_nothing
from depgraph.trace import Trace, TraceError, trace_forward


def is_same_in_both_modes(trace: Trace, model: nn.Module) -> bool:
    """Whether it is proven that a model, as traced, runs the same ops in both modes.

    Parameters
    ----------
    trace : Trace
        With all modules in one mode.
    model : nn.Module
        That was traced.

    Returns
    -------
    bool
        False also where it cannot be told.
    """
    if len(set(trace.modes.values())) != 1 or "" in trace.mode_readers:
        return False
    with ready_to_watch():
        return all(
            _is_same(model.get_submodule(name), call)
            for name in sorted(trace.mode_readers)
            for call in trace.calls_of[name]
        )


def _is_same(module: nn.Module, call: ModuleCall) -> bool:
    args, kwargs = call.args, call.kwargs
    if any(leaf is UNREAD for leaf in pytree.tree_leaves((args, kwargs))):
        return False
    args, kwargs = pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], (args, kwargs))
    found = []
    for training in (False, True):
        copy = structural_copy(module)
        copy.train(training)  # which need not give the module back
        try:
            traced = trace_forward(copy, args, kwargs)
        except TraceError:
            return False
        if traced.constants:
            return False
        found.append(list(_steps(traced)))
    return found[0] == found[1]


def _steps(trace: Trace) -> Iterator[Any]:
    """Every node in terms of the places of others, and what is seen of its value."""
    place = {node: i for i, node in enumerate(trace.nodes)}
    for node in trace.nodes:
        if drops_nothing(node):
            yield place[node.all_input_nodes[0]]
            continue
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: ("node", place[n]))
        values = pytree.tree_leaves(node.meta.get("val"))
        looks = [(x.shape, x.stride(), x.dtype) for x in values if isinstance(x, Tensor)]
        yield (node.op, node.target, args, kwargs, looks)
