"""The module tree of a model: names, tensors, and a copy of its structure."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.errors import DepgraphError

_IMMUTABLE = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
    | {types.FunctionType, types.BuiltinFunctionType, type, range, torch.memory_format}
)
_EMPTY = (dict, OrderedDict, set)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What ``model.named_modules()`` gives, in time linear in the number of modules."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        prefix = f"{name}." if name else ""
        for key, child in module._modules.items():
            if child is not None:
                visit(prefix + key, child)

    visit("", model)
    return found


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Every parameter and buffer once, by its first name, and which of the names are parameters."""
    modules = named_modules(model)
    parameters = _named(modules, "_parameters")
    return {**parameters, **_named(modules, "_buffers")}, frozenset(parameters)


def _named(modules: dict[str, nn.Module], registry: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        for key, tensor in vars(module)[registry].items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[prefix + key] = tensor
    return found


def _detach(value: Any, memo: dict[int, Any]) -> None:
    """Copies of what a forward computed and left in its module, which torch does not copy."""
    for item in pytree.tree_leaves(value):
        if isinstance(item, Tensor) and id(item) not in memo and not item.is_leaf:
            memo[id(item)] = item.detach().clone()


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy of the module tree that shares every parameter and buffer with the original.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
        New module objects; attributes are copied, tensors that are registered are not.
    """
    memo: dict[int, Any] = {}
    modules = list(named_modules(model).values())
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
    plain = [module for module in modules if not hasattr(type(module), "__deepcopy__")]
    # deepcopy itself would spend most of the time on the empty hook registries of every module
    memo.update((id(module), type(module).__new__(type(module))) for module in plain)
    for module in plain:
        state = vars(memo[id(module)])
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _IMMUTABLE:
                state[name] = value
            elif kind in _EMPTY and not value:
                state[name] = kind()
            elif kind is tuple and all(type(item) in _IMMUTABLE for item in value):
                state[name] = value
            else:
                _detach(value, memo)
                try:
                    state[name] = copy.deepcopy(value, memo)
                except (TypeError, copy.Error) as error:  # a lock, an open file
                    raise DepgraphError(
                        f"attribute '{name}' of a {type(module).__name__} cannot be copied "
                        f"({error}); take it off the model meanwhile"
                    ) from error
    return copy.deepcopy(model, memo)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, whose sizes are its parameters'."""
    return type(module).__module__.startswith("torch.nn.") and not any(module.children())


def held_tensors(model: nn.Module) -> dict[int, tuple[Any, ...]]:
    """Where modules hold tensors that they have not registered.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of int to tuple
        By the tensor's identity: name of the module, of its attribute, and the places in lists,
        tuples and dicts within.
    """
    found: dict[int, tuple[Any, ...]] = {}

    def note(value: Any, path: tuple[Any, ...]) -> None:
        kind = type(value)
        if isinstance(value, Tensor):
            found.setdefault(id(value), path)
        elif kind in (dict, list, tuple):
            for key, item in value.items() if kind is dict else enumerate(value):
                note(item, (*path, key))

    for name, module in named_modules(model).items():
        for attribute, value in vars(module).items():
            if attribute not in _REGISTRIES:
                note(value, (name, attribute))
    return found


_REGISTRIES = frozenset(vars(nn.Module())) - {"training"} | {"depgraph_plans"}
