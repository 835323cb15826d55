"""Tells which calls of modules must run the same ops, so that one of them stands for all.

A forward is a function of its code, of the attributes, tensors and children of its module, and of
its arguments. Two calls that agree in all of these (of tensors: in what an op can see of them on
the meta device) run the same ops on corresponding operands: that is why a recorded call may be
repeated for another block without running its forward. Whatever cannot be compared (an object of
an unknown kind, a hook, a tensor outside of the registries) makes a call unlike any other.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SKIPPED = frozenset(
    {
        "_modules",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
"""Attributes of every module that no forward reads."""
_HOOKS = frozenset(
    {
        "_backward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
)
_REGISTRIES = ("_parameters", "_buffers")
_ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device}
    | {torch.layout, torch.memory_format, types.BuiltinFunctionType, types.FunctionType, type}
)
_SEQUENCES = frozenset({tuple, list, torch.Size})
_DICTS = (dict, OrderedDict)


class UnlikeError(Exception):
    """Something cannot be compared; never leaves this package."""


def plain_key(value: Any) -> Any:
    """A hashable value that is equal for equal plain data; functions and classes are themselves.

    Raises
    ------
    UnlikeError
        For any other object.
    """
    kind = type(value)
    if kind in _ATOMS or isinstance(value, (type, enum.Enum)):
        return (kind, value)
    if kind in _SEQUENCES:
        return (kind, tuple(map(plain_key, value)))
    if kind in _DICTS:
        return (kind, tuple((plain_key(key), plain_key(item)) for key, item in value.items()))
    if kind in (set, frozenset):
        return (kind, frozenset(map(plain_key, value)))
    if kind is functools.partial:
        return (kind, *map(plain_key, (value.func, value.args, value.keywords)))
    raise UnlikeError


def looks(tensor: Tensor) -> tuple[Any, ...]:
    """What an op or a forward can see of a tensor on the meta device."""
    return (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)


class Likeness:
    """What the modules of one model are, as numbers: equal for modules that are alike."""

    def __init__(self, model: nn.Module) -> None:
        paths = within(model)
        times = Counter(map(id, paths))
        modules = {id(module): module for module in paths}.values()
        times.update(id(tensor) for module in modules for tensor in own_tensors(module))
        # what is found in several places is alike only to itself
        self._shared = {key for key, count in times.items() if count > 1}
        self._numbers: dict[Any, int] = {}
        self._known: dict[int, int] = {}

    def forget(self) -> None:
        """Compare all modules anew from here on, because one has changed."""
        self._known.clear()

    def of(self, module: nn.Module) -> int:
        """The number of a module, which another one has only if it is the same inside.

        Raises
        ------
        UnlikeError
            When it holds something that cannot be compared.
        """
        known = self._known.get(id(module))
        if known is None:
            key = (*self._own(module), *self._children(module))
            known = self._numbers.setdefault(key, len(self._numbers))
            self._known[id(module)] = known
        if known < 0:
            raise UnlikeError
        return known

    def _own(self, module: nn.Module) -> Iterator[Any]:
        self._known[id(module)] = -1  # stays where this raises
        if type(module).__call__ is not nn.Module.__call__:
            raise UnlikeError
        yield _code(module)
        if id(module) in self._shared:
            yield id(module)
        for name, value in vars(module).items():
            if name in _SKIPPED:
                continue
            if name in _REGISTRIES:
                for key, tensor in value.items():
                    yield (key, None if tensor is None else self._tensor(tensor))
            elif name not in _HOOKS:
                yield (name, plain_key(value))
            elif value:
                raise UnlikeError

    def _tensor(self, tensor: Tensor) -> Any:
        return (id(tensor) if id(tensor) in self._shared else None, *looks(tensor))

    def _children(self, module: nn.Module) -> Iterator[Any]:
        for name, child in module._modules.items():
            yield (name, None if child is None else self.of(child))


def _code(module: nn.Module) -> Any:
    """What a module runs: its class, or how its forward was rewritten."""
    cls = type(module)
    rewrite = vars(cls).get("depgraph_rewrite")
    return cls if rewrite is None or rewrite.alike is None else (cls.__bases__, rewrite.alike)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that a module itself holds."""
    found = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in found if tensor is not None]


def within(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, in the order of its registries, with repetition."""
    found = [module]
    for child in module._modules.values():
        if child is not None:
            found.extend(within(child))
    return found
