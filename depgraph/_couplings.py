"""Tells whether a model couples the same dimensions in training as in evaluation, part by part.

Its forward can differ only through a module that reads its mode. Where each of these gives the same
shapes in both modes, and joins and reduces the same dimensions on the way, all the rest runs the
same ops: a drop-out, a batch norm, a stochastic depth. The model is not run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph._alike import UnlikeError, looks, plain_key
from depgraph._calls import UNREAD, ModuleCall
from depgraph._modules import structural_copy
from depgraph._watch import ready_to_watch
from depgraph.axes import Atom, Axis, Concat
from depgraph.propagate import Propagation, op_name
from depgraph.trace import Trace, TraceError, shape, trace_forward

_NEUTRAL = frozenset(
    f"aten.{name}"
    for name in (
        *("dropout", "feature_dropout", "bernoulli", "empty", "new_empty", "empty_like", "rand"),
        *("rand_like", "mul", "div", "detach", "clone", "to", "_to_copy"),
    )
)
"""Ops that treat every element alike and give zero at zero; what they join, the axes tell."""


def couples_alike(trace: Trace, model: nn.Module) -> bool:
    """Whether it is proven that a model couples the same dimensions in both modes.

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
    known: dict[Any, bool] = {}
    with ready_to_watch():
        for name in sorted(trace.mode_readers):
            module = model.get_submodule(name)
            for call in () if _is_layer(module) else trace.calls_of[name]:
                key = _key(module, call)
                if key not in known:
                    known[key] = _is_alike(module, call)
                if not known[key]:
                    return False
    return True


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, which couple the same in both modes."""
    return type(module).__module__.startswith("torch.nn.") and not any(module.children())


def _values(call: ModuleCall) -> Any:
    return pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], (call.args, call.kwargs))


def _key(module: nn.Module, call: ModuleCall) -> Any:
    """Equal for calls that do the same."""
    leaves, spec = pytree.tree_flatten(_values(call))
    first = tuple(next(i for i, y in enumerate(leaves) if y is x) for x in leaves)
    return (_identity(module), str(spec), tuple(map(_identity, leaves)), first)


def _identity(value: Any) -> Any:
    """What is seen of a tensor, a module or plain data; any other object is like itself alone."""
    if isinstance(value, Tensor):
        return looks(value)
    if isinstance(value, nn.Module):
        state = {**vars(value), **value._parameters, **value._buffers, **value._modules}
        own = {key: x for key, x in state.items() if key not in ("_parameters", "_buffers")}
        del own["_modules"]
        return (type(value), *((key, _identity(x)) for key, x in own.items()))
    try:
        return plain_key(value)
    except UnlikeError:
        return id(value)


def _is_alike(module: nn.Module, call: ModuleCall) -> bool:
    args, kwargs = _values(call)
    if any(leaf is UNREAD for leaf in pytree.tree_leaves((args, kwargs))):
        return False
    found = []
    copy = structural_copy(module)
    for training in (False, True):
        copy.train(training)  # which need not give the module back
        try:
            traced = trace_forward(copy, args, kwargs)
        except TraceError:
            return False
        if traced.complete is not None:
            return False
        found.append(_couplings(traced))
    return found[0] == found[1]


def _couplings(traced: Trace) -> Any:
    """What a forward gives, what its tensors share, and what else than neutral ops it runs."""
    p = Propagation(traced)
    p.run(outputs_are_fixed=False)
    place = {node: i for i, node in enumerate(traced.outputs)}
    output = traced.calls_of[""][0].output
    gives = [
        place[leaf] if isinstance(leaf, fx.Node) else repr(leaf)
        for leaf in pytree.tree_leaves(output)
    ]
    types = [node.meta["val"].dtype for node in traced.outputs]
    places = (*traced.tensors.values(), *traced.inputs, *traced.outputs)
    # of nothing that has dimensions: noise, and a count of batches
    made = {node for node in traced.tensors.values() if not any(n > 1 for n in shape(node))}
    names = []
    for node in traced.nodes:
        if node.op == "call_function" and made.issuperset(node.all_input_nodes):
            made.add(node)
        elif node.op == "call_function":
            names.append(op_name(node).rstrip("_"))
    return (
        str(pytree.tree_structure(output)),
        gives,
        types,
        list(_shared(p.axes(node) for node in places)),
        [shape(node) for node in traced.outputs],
        [name for name in names if name not in _NEUTRAL],
    )


def _shared(values: Iterable[list[Axis]]) -> Iterator[Any]:
    """Axes with a number in place of each atom, in the order in which they occur."""
    numbers: dict[Atom, int] = {}

    def numbered(axis: Axis) -> Any:
        return [
            [numbered(part) for part in factor.parts]
            if isinstance(factor, Concat)
            else (numbers.setdefault(factor, len(numbers)), factor.size, factor.frozen is None)
            for factor in axis
        ]

    for axes in values:
        yield [numbered(axis) for axis in axes]
