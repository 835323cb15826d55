"""Tells whether a model couples the same dimensions in training as in evaluation.

Its forward can differ only through a module that reads its mode. So each of these runs in the other
mode, once for all that are alike, and both forwards are numbered value by value: equal ops on equal
values get equal numbers, and what treats every element alike (a drop-out, a stochastic depth)
passes its operand's on. Where all numbers are the same, so are the couplings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.coupling.propagate import arguments, op_name
from depgraph.tracing.alike import UnlikeError, looks, plain_key
from depgraph.tracing.calls import ModuleCall, Unread
from depgraph.tracing.modules import is_layer, named_tensors, structural_copy
from depgraph.tracing.trace import Trace, TraceError, shape, trace_forward

_PASSING = frozenset(
    f"aten.{name}"
    for name in ("dropout", "feature_dropout", "detach", "clone", "contiguous", "to", "_to_copy")
)
_WITH_MODE = frozenset(
    f"aten.{name}" for name in ("batch_norm", "instance_norm", "scaled_dot_product_attention")
)
_OF_MODE = frozenset({"training", "use_input_stats", "dropout_p", "momentum"})
_SCALING = frozenset({"aten.mul", "aten.div"})
_MAKING = frozenset(
    f"aten.{name}" for name in ("empty", "new_empty", "rand", "new_zeros", "new_ones", "new_full")
)
"""Ops whose result may be noise for each sample, as stochastic depth draws it."""
_EACH = (
    _MAKING
    | _PASSING
    | _SCALING
    | {
        f"aten.{name}"
        for name in ("add", "sub", "rsub", "bernoulli", "uniform", "floor", "lt", "le", "gt", "ge")
    }
)
"""Ops that leave noise to be noise: none of them tells one entry from another."""


def parts_couple_alike(trace: Trace, model: nn.Module) -> bool:
    """Whether it is proven, part by part, that a model couples the same dimensions in both modes.

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
    readers = {name for name in trace.mode_readers if not is_layer(model.get_submodule(name))}
    readers |= {name for name, module in model.named_modules() if _is_told(module)}
    if len(set(trace.modes.values())) != 1 or "" in readers:
        return not readers
    if not readers <= trace.calls_of.keys():
        return False
    names = {id(tensor): name for name, tensor in named_tensors(model)[0].items()}
    known: dict[Any, bool] = {}
    for name in _outermost(readers):
        module = model.get_submodule(name)
        for call in trace.calls_of[name]:
            key = _key(module, call)
            if key not in known:
                known[key] = _is_alike(trace, module, call, names)
            if not known[key]:
                return False
    return True


def couples_alike(one: Trace, other: Trace) -> bool:
    """Whether it is proven that a model couples the same dimensions in two traces of it.

    Parameters
    ----------
    one, other : Trace
        With the same inputs, in different modes.

    Returns
    -------
    bool
        False also where it cannot be told.
    """
    numbers = _Numbers()
    told = []
    for trace in (one, other):
        whole = trace.complete or trace
        values = numbers.of(whole.nodes, whole.tensors, whole.inputs, one.batch)
        place = {node: i for i, node in enumerate(trace.outputs)}
        output = pytree.tree_map_only(fx.Node, place.__getitem__, trace.calls_of[""][0].output)
        told.append((output, list(map(values.known.get, whole.outputs)), values.computed))
    return told[0] == told[1]


def _is_told(module: nn.Module) -> bool:
    """Whether a module may note in a way of its own that the mode changes."""
    return type(module).train is not nn.Module.train and not is_layer(module)


def _outermost(names: Iterable[str]) -> Iterator[str]:
    """Names of modules that are within no other of these."""
    last = None
    for name in sorted(names, key=lambda name: name.split(".")):
        if last is None or not name.startswith(f"{last}."):
            last = name
            yield name


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


def _is_alike(trace: Trace, module: nn.Module, call: ModuleCall, names: Mapping[int, str]) -> bool:
    """Whether a call runs the same in the other mode."""
    args, kwargs = _values(call)
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    if any(isinstance(leaf, Unread) for leaf in leaves):
        return False
    copy = structural_copy(module)
    copy.train(not trace.modes[call.name])  # which need not give the module back
    try:
        other = trace_forward(copy, args, kwargs)
    except TraceError:
        return False
    if other.complete is not None:
        return False
    local = {name: names[id(tensor)] for name, tensor in named_tensors(module)[0].items()}
    numbers = _Numbers()
    before = numbers.of(
        trace.nodes[call.start : call.end],
        {name: trace.tensors[name] for name in local.values()},
        [leaf for leaf in leaves if isinstance(leaf, fx.Node)],
        trace.batch,
    )
    after = numbers.of(
        other.nodes,
        {local[name]: node for name, node in other.tensors.items()},
        other.inputs,
        trace.batch,
    )
    output = other.calls_of[""][0].output
    return before.given(call.output) == after.given(output) and before.computed == after.computed


@dataclass(frozen=True)
class _Numbered:
    """Numbers of values, but for noise and single numbers; and those of what ops compute."""

    known: dict[fx.Node, int]
    computed: set[int]

    def given(self, output: Any) -> Any:
        """A module's result in numbers."""
        leaves, spec = pytree.tree_flatten(output)
        return str(spec), [self.known.get(x) if isinstance(x, fx.Node) else repr(x) for x in leaves]


class _Numbers:
    """Gives equal numbers to values that are computed alike."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def of(
        self,
        nodes: Iterable[fx.Node],
        tensors: Mapping[str, fx.Node],
        inputs: Iterable[fx.Node],
        batch: int,
    ) -> _Numbered:
        """Numbers of what nodes compute from tensors and inputs."""
        known: dict[fx.Node, int] = {}
        for i, node in enumerate(inputs):
            known.setdefault(node, self._number("input", i))
        known.update((node, self._number("tensor", name)) for name, node in tensors.items())
        single = {node for node in tensors.values() if not any(n > 1 for n in shape(node))}
        noise: set[fx.Node] = set()
        computed: set[int] = set()
        for node in nodes:
            if node.op != "call_function":
                continue
            name, operands = op_name(node).rstrip("_"), node.all_input_nodes
            one = not any(n > 1 for n in shape(node))
            if operands and one and single.issuperset(operands):  # as a count of batches
                single.add(node)
            elif _is_noise(node, name, noise, batch):
                noise.add(node)
            elif (same := _passed_on(node, name, noise)) in known:
                known[node] = known[same]
            else:
                told = pytree.tree_map(lambda x: _argument(x, known), _arguments(node, name))
                known[node] = self._number(name, shape(node), str(told))
                computed.add(known[node])
        return _Numbered(known, computed)


def _is_noise(node: fx.Node, name: str, noise: set[fx.Node], batch: int) -> bool:
    """Whether a value has one entry for each sample, made of nothing that has dimensions."""
    first, *rest = shape(node) or (1,)
    if first % batch or any(n > 1 for n in rest):
        return False
    inputs = node.all_input_nodes
    return name in _MAKING or (name in _EACH and bool(inputs) and noise.issuperset(inputs))


def _passed_on(node: fx.Node, name: str, noise: set[fx.Node]) -> Any:
    """The operand that a value is, as far as its dimensions tell."""
    if name in _PASSING:
        return node.args[0]
    if name not in _SCALING:
        return None
    left, right = node.args[:2]
    if isinstance(right, fx.Node):
        return _scaled(left, right, noise) or (name == "aten.mul" and _scaled(right, left, noise))
    after = [
        op_name(user) == "aten.mul" and _scaled(node, user.args[1], noise) for user in node.users
    ]  # by what makes up for the noise; any other number may be that of a width
    return left if after and all(after) else None


def _scaled(value: Any, scale: Any, noise: set[fx.Node]) -> Any:
    """A value that is multiplied by noise of its first dimension."""
    if scale in noise and len(shape(scale)) == len(shape(value)):
        return value
    return None


def _arguments(node: fx.Node, name: str) -> Any:
    """What an op is given, but for a probability and whether it is training."""
    if name in _WITH_MODE:
        return [value for key, value in arguments(node).items() if key not in _OF_MODE]
    return node.args, node.kwargs


def _argument(value: Any, known: Mapping[fx.Node, int]) -> Any:
    """What of an argument tells dimensions."""
    if isinstance(value, fx.Node):
        return ("value", known.get(value), shape(value))
    return value
