"""Every tensor that a model holds, registered or in an attribute, and others in their places."""

from __future__ import annotations

import argparse
import dataclasses
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.tracing.meta import on_meta
from depgraph.tracing.modules import named_modules, structural_copy

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that torch gives each module; the registries and hooks are among them."""

Change = Callable[[str, Tensor], Tensor]


def registries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dicts in which a module has its own parameters and buffers."""
    return module._parameters, module._buffers


def registered(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones by each name, those of a shared module by one.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Tensor
    """
    return {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in named_modules(model).items()
        for registry in registries(module)
        for key, tensor in registry.items()
        if tensor is not None
    }


def transient(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that a state dict leaves out."""
    return frozenset(
        f"{name}.{key}".lstrip(".")
        for name, module in named_modules(model).items()
        for key in module._non_persistent_buffers_set
    )


_PLANS = {"depgraph_plans"}
"""What a plan says of a cut is in the plan."""


def held(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold in attributes, lists, tuples, dicts and records, not registered.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Tensor
        By the path of attribute names, keys and places that leads to each.
    """
    own = {id(tensor) for tensor in registered(model).values()}
    found: dict[str, Tensor] = {}

    def note(path: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            found[path] = tensor
        return tensor

    change_held(model, note)
    return found


def change_held(model: nn.Module, change: Change) -> None:
    """Put ``change(path, tensor)`` in place of each tensor that an attribute of a module holds."""
    seen: set[int] = set()
    for name, module in named_modules(model).items():
        attributes = vars(module)
        for key in attributes.keys() - OF_EVERY_MODULE - _PLANS:
            path = f"{name}.{key}".lstrip(".")
            value = attributes[key]
            new = _changed(value, path, change, seen)
            if new is not value:
                attributes[key] = new


def replace_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put other tensors in the place of those with the given identities, wherever they are held.

    Layers that keep a list of their own parameters (``nn.LSTM``) go on using the registered ones.
    """
    for module in named_modules(model).values():
        for registry in registries(module):
            for key, tensor in registry.items():
                if tensor is not None and id(tensor) in new:
                    registry[key] = new[id(tensor)]
    change_held(model, lambda path, tensor: new.get(id(tensor), tensor))


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a model with its parameters on the meta device; a forward may read its buffers."""
    model = structural_copy(model)
    replace_tensors(model, {id(parameter): on_meta(parameter) for parameter in model.parameters()})
    return model


def cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Put meta tensors in the place of the floating ones whose dtype is to be another.

    Parameters
    ----------
    model : nn.Module
    dtypes : mapping of str to torch.dtype
        By name; float32 for those that are not in it.
    """
    new = {}
    for name, tensor in registered(model).items():
        dtype = dtypes.get(name, torch.float32)
        if tensor.is_floating_point() and tensor.dtype != dtype:
            new[id(tensor)] = like(tensor, torch.empty_like(tensor, dtype=dtype, device="meta"))
    if new:
        replace_tensors(model, new)


def like(old: Tensor, value: Tensor, requires_grad: bool | None = None) -> Tensor:
    """A tensor as the parameter or buffer that another one was."""
    if not isinstance(old, nn.Parameter):
        return value
    wanted = old.requires_grad if requires_grad is None else requires_grad
    new = nn.Parameter(value, requires_grad=wanted and value.dtype.is_floating_point)
    vars(new).update(vars(old))
    return new


def is_record(value: Any) -> bool:
    """Whether a value is nothing but named fields."""
    plain = isinstance(value, (argparse.Namespace, types.SimpleNamespace))
    dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return (plain or dataclass) and hasattr(value, "__dict__")


def _changed(value: Any, path: str, change: Change, seen: set[int]) -> Any:
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, weakref.ref):
        target = value()
        new = change(path, target) if isinstance(target, Tensor) else target
        return value if new is target else weakref.ref(new)
    if isinstance(value, tuple):
        items = [_changed(item, f"{path}.{i}", change, seen) for i, item in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not (isinstance(value, (list, dict)) or is_record(value)) or id(value) in seen:
        return value
    seen.add(id(value))
    holder: Any = value if isinstance(value, (list, dict)) else vars(value)
    for key in list(range(len(holder)) if isinstance(holder, list) else holder):
        old = holder[key]
        new = _changed(old, f"{path}.{key}", change, seen)
        if new is not old:
            holder[key] = new
    return value
