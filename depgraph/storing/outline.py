"""What a model is, beside its weights, as short digests: to tell whether another one is the same.

Nothing is ever made from an outline; it can only be compared with that of a model that is there.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.plan import Plan
from depgraph.storing.recipe import LIBRARIES, ORIGIN
from depgraph.tracing.caches import Cache, forget
from depgraph.tracing.inputs import example_from_spec, set_modes, state_dtypes
from depgraph.tracing.modules import named_modules, structural_copy
from depgraph.tracing.placing import OF_EVERY_MODULE, cast, is_record
from depgraph.tracing.trace import trace_forward

_HOOKS = tuple(sorted(key for key in OF_EVERY_MODULE if key.endswith("_hooks")))
_ORIGIN = ORIGIN | {"model_type"}
_OURS = ("depgraph_plans", "name_or_path", "save_pretrained")
"""Attributes that say where a model is from."""
_LIBRARIES = ("torch", *LIBRARIES)
Facts = dict[str, str]


def facts(model: nn.Module, caches: frozenset[Cache] = frozenset()) -> Facts:
    """A digest of each class, hook and attribute of a model.

    Parameters
    ----------
    model : nn.Module
    caches : frozenset of Cache, optional
        Of which the contents do not matter.

    Returns
    -------
    dict of str to str
        By ``"module.attribute"``. Of tensors only that they are there; private attributes, devices
        and hooks that a library puts on its own modules at a call are left out.
    """
    if caches:
        model = structural_copy(model)
        forget(model, caches)
    modules = named_modules(model)
    says = _Says({id(module): name for name, module in modules.items()})
    found: Facts = {}
    for name, module in modules.items():
        cls = type(module)
        found[f"{name} (class)"] = _digest(cls.__name__)
        hooks = [f"{key} {_name(hook)}" for key in _HOOKS for hook in _hooks(module, key)]
        if hooks:
            found[f"{name} (hooks: {', '.join(hooks)})"] = _digest(hooks)
        for key, value in vars(module).items():
            if key not in OF_EVERY_MODULE and key not in _OURS and key[0] != "_":
                found[f"{name}.{key}".lstrip(".")] = _digest(says(value))
    return found


def _hooks(module: nn.Module, key: str) -> Iterator[Any]:
    """A module's hooks of one kind, without those that its library would put there again."""
    package = type(module).__module__.partition(".")[0]
    for hook in vars(module)[key].values():
        own = getattr(hook, "__module__", "") or ""
        if not (package in LIBRARIES and own.partition(".")[0] in LIBRARIES):
            yield hook


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first thing that only one of two outlines has, or that differs; None where none does."""
    for name in (*expected, *(name for name in found if name not in expected)):
        if expected.get(name) != found.get(name):
            return name.strip()
    return None


class _Says:
    """What a value is, in words and numbers that do not depend on the process."""

    def __init__(self, modules: Mapping[int, str]) -> None:
        self.modules = modules
        self.open: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, complex, str, bytes, range):
            return value
        if isinstance(value, nn.Module):
            return ("module", self.modules.get(id(value), type(value).__name__))
        if isinstance(value, Tensor):
            return ("tensor", tuple(value.shape))
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, enum.Enum):
            return (type(value).__name__, value.name)
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return _name(value)
        if id(value) in self.open:
            return "again"
        self.open.add(id(value))
        try:
            return self._compound(value)
        finally:
            self.open.discard(id(value))

    def _compound(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self(item) for item in value]
        if isinstance(value, dict):
            return [(self(key), self(item)) for key, item in value.items() if key not in _ORIGIN]
        if isinstance(value, (set, frozenset)):
            return sorted(repr(self(item)) for item in value)
        if isinstance(value, weakref.ref):
            return ("ref", self(value()))
        if isinstance(value, types.MethodType):
            return ("method", _name(value.__func__), self(value.__self__))
        if isinstance(value, functools.partial):
            return ("partial", self(value.func), self(value.args), self(value.keywords))
        if type(value).__module__ == "numpy":
            return (type(value).__name__, str(value.dtype), value.tobytes())
        name = type(value).__qualname__
        if is_record(value) or type(value).__module__.partition(".")[0] in _LIBRARIES:
            own = getattr(value, "__dict__", {})
            return (
                name,
                [(k, self(v)) for k, v in own.items() if k[0] != "_" and k not in _ORIGIN],
            )
        return name


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _digest(value: Any) -> str:
    return blake2b(repr(value).encode(), digest_size=6).hexdigest()


def ops(model: nn.Module, plan: Plan) -> tuple[Facts, frozenset[Cache]]:
    """A digest of each op that a forward runs, and the caches that it fills.

    Parameters
    ----------
    model : nn.Module
        It is not changed.
    plan : Plan
        The last one that was applied: it has inputs, modes and floating types to trace with.

    Returns
    -------
    dict of str to str
        By the number of the op and its name.

    Raises
    ------
    DepgraphError
        When the forward cannot be traced.
    """
    model = structural_copy(model)
    cast(model, state_dtypes(plan.state))
    set_modes(model, plan.state)
    example = example_from_spec(plan.inputs)
    args, kwargs = ((), example) if isinstance(example, dict) else (tuple(example), {})
    traced = trace_forward(model, args, kwargs)
    number = {node: i for i, node in enumerate(traced.nodes)}
    found = {}
    for node in traced.nodes:
        if node.op == "call_function":
            where = traced.owner.get(node, "")
            label = f"op {number[node]}, {node.target} of '{where}'"
            found[label] = _digest(_said(node, number.__getitem__))
    return found, traced.caches


def _said(node: fx.Node, number: Callable[[fx.Node], int]) -> Any:
    """An op's operands by their numbers, its other arguments, and what its result looks like."""

    def leaf(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number(value))
        return "device" if isinstance(value, torch.device) else value

    result = [
        (tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else None
        for x in pytree.tree_leaves(node.meta.get("val"))
    ]
    return (pytree.tree_leaves(pytree.tree_map(leaf, (node.args, node.kwargs))), result)
