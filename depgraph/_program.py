"""A forward as plain data: a list of ATen calls, child modules and sizes, compiled by ``torch.fx``.

A module whose forward has a size written into it (``reshape(B, N, C)`` with the width of its input)
cannot be made smaller by changing attributes. It gets a forward generated from its own part of the
trace; the data form is what a saved model stores, so that loading runs no code from a file.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from depgraph._calls import is_named_tuple
from depgraph._folding import (
    ATTRIBUTE,
    constants_property,
    constants_readable,
    split_constants,
)
from depgraph._trusted import load_object
from depgraph.errors import DepgraphError

Program = list[dict[str, Any]]


def require(value: Any, expected: Any, name: str) -> None:
    """Refuse an argument that the generated forward was not made for."""
    if value is not expected and _listed(value) != _listed(expected):
        raise DepgraphError(
            f"this pruned module was made for {name}={expected!r}; got another value, which needs "
            "pruning again from a trace that passes it"
        )


def require_same(first: Any, second: Any, name: str) -> None:
    """Refuse two arguments that were one tensor when the generated forward was made."""
    if first is not second:
        raise DepgraphError(
            f"this pruned module was made for one tensor as {name}; got two, which needs pruning "
            "again from a trace that passes two"
        )


def rebuild(name: str, values: dict[str, Any]) -> Any:
    """A dataclass, named tuple or dict of the given name with these fields, as a module gave it."""
    cls = load_object(name)
    if isinstance(cls, type) and (dataclasses.is_dataclass(cls) or is_named_tuple(cls)):
        return cls(**values)
    if isinstance(cls, type) and issubclass(cls, dict):
        return cls(values)
    raise DepgraphError(
        f"a generated forward returns a dataclass, a named tuple or a dict; '{name}' is none"
    )


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, (tuple, list)) else value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "require": require,
    "require_same": require_same,
    "rebuild": rebuild,
    "getattr": getattr,
}
_NAMED = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
    "device": torch.device,
}


def function_name(target: Any) -> str:
    """Name under which a program stores a function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, function in _FUNCTIONS.items():
        if function is target:
            return name
    raise DepgraphError(f"a generated forward cannot call '{target}'")


def _function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    if namespace != "aten":
        raise DepgraphError(f"a saved forward may call ATen ops only, not '{name}'")
    packet = getattr(torch.ops.aten, op, None)
    if packet is None or overload not in packet.overloads():
        raise DepgraphError(f"this torch has no op '{name}', which the saved forward calls")
    return getattr(packet, overload)


def encode(value: Any) -> Any:
    """An argument as plain data; fx nodes become references by name."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise DepgraphError(f"a generated forward cannot hold a {type(value).__name__} ({value!r})")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, text),) = value.items()
    if kind == "node":
        return nodes[text]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in text)
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in text.items()}
    return torch.device(text) if kind == "device" else getattr(torch, text)


def to_program(graph: fx.Graph) -> Program:
    """A graph as plain data."""
    return [
        {
            "op": node.op,
            "name": node.name,
            "target": node.target if isinstance(node.target, str) else function_name(node.target),
            "args": encode(list(node.args)),
            "kwargs": {key: encode(value) for key, value in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def to_graph(program: Program) -> fx.Graph:
    """The graph that `to_program` wrote down."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in program:
        target = item["target"]
        if item["op"] == "call_function":
            target = _function(target)
        args = tuple(_decode(item["args"], nodes))
        kwargs = {key: _decode(value, nodes) for key, value in item["kwargs"].items()}
        nodes[item["name"]] = graph.create_node(item["op"], target, args, kwargs, item["name"])
    return graph


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<depgraph: generated forward>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def programmed_class(base: type[nn.Module], programs: dict[str, Program | None]) -> type[nn.Module]:
    """A subclass of a module's class whose forward is generated.

    Parameters
    ----------
    base : type
        Class of the module; its other methods stay.
    programs : dict
        ``{"eval": program, "train": program}``; one where both are the same. A program of None
        stands for a mode in which the model could not be traced.

    Returns
    -------
    type
        One for all modules with the same base and the same programs.
    """
    key = (base, repr(programs))
    made = _classes.get(key)
    if made is None:
        made = _classes[key] = _new_class(base, programs)
    return made


_classes: WeakValueDictionary[tuple[type, str], type[nn.Module]] = WeakValueDictionary()


def _new_class(base: type[nn.Module], programs: dict[str, Program | None]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "depgraph_programs": programs,
        "__module__": base.__module__,
        "__doc__": f"{base.__name__} with a forward generated for its pruned sizes.",
    }
    if "train" in programs:
        for mode, program in programs.items():
            namespace[f"_forward_{mode}"] = _forward(program, namespace, fold=mode == "eval")
        namespace["forward"] = _by_mode
    else:
        namespace["forward"] = _forward(programs["eval"], namespace, fold=True)
    return type(base.__name__, (base,), namespace)


def _forward(program: Program | None, namespace: dict[str, Any], fold: bool) -> Callable[..., Any]:
    """The forward of a program; what it keeps between calls goes into the namespace."""
    if program is None:
        return _refuse
    whole = _compile(to_graph(program))
    parts = split_constants(to_graph(program)) if fold else None
    if parts is None:
        return whole
    graph, constants, names = parts
    namespace[ATTRIBUTE] = constants_property(_compile(constants), names)
    folded, readable = _compile(graph), constants_readable(names)

    @functools.wraps(whole)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (folded if readable(self) else whole)(self, *args, **kwargs)

    return forward


def _by_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
    return (self._forward_train if self.training else self._forward_eval)(*args, **kwargs)


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    mode = "training" if self.training else "evaluation"
    raise DepgraphError(
        f"this pruned {type(self).__name__} has no forward for {mode} mode, in which the original "
        "model could not be traced; call train() or eval() before"
    )


def original_class(module: nn.Module) -> type[nn.Module]:
    """Class of a module before its forward was generated."""
    cls = type(module)
    return cls.__bases__[0] if "depgraph_programs" in cls.__dict__ else cls
