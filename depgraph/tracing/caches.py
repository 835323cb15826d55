"""What remembers results: functions, bypassed for the time of a trace, and modules' own dicts.

A tensor that exists only within a trace must not end up in an ``functools.lru_cache``, where the
user's model would find it later, nor may one layer of a trace live off what another computed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

_Cached = functools._lru_cache_wrapper


Cache = tuple[type[nn.Module], str]
"""A dict, by its attribute in the modules of a class."""


def filling(model: nn.Module) -> dict[tuple[nn.Module, str], int]:
    """How many entries each dict has that a module of the model holds."""
    return {
        (module, name): len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and name not in _OF_EVERY_MODULE
    }


def filled(before: dict[tuple[nn.Module, str], int]) -> frozenset[Cache]:
    """The dicts that have got more entries since, as caches do."""
    return frozenset(
        (type(module), name)
        for (module, name), count in before.items()
        if len(vars(module).get(name, ())) > count
    )


def remembering(model: nn.Module) -> frozenset[Cache]:
    """The dicts of tensors that a model's modules hold."""
    return frozenset(
        (type(module), name)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict
        and name not in _OF_EVERY_MODULE
        and any(isinstance(item, Tensor) for item in value.values())
    )


def forget(model: nn.Module, caches: frozenset[Cache]) -> None:
    """Drop the tensors in a model's caches: they may be of other sizes than it has now."""
    for module in model.modules():
        for cls, name in caches:
            if isinstance(module, cls):
                held = vars(module).get(name, {})
                for key in [key for key, value in held.items() if isinstance(value, Tensor)]:
                    del held[key]


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def caches_bypassed(model: nn.Module) -> Iterator[None]:
    """Call what is behind every ``lru_cache`` in the classes and source files of a model.

    Parameters
    ----------
    model : nn.Module
        Its classes are as before at the end, and so are the caches' contents.
    """
    with ExitStack() as stack:
        for holder in _holders(model):
            for name, value in list(vars(holder).items()):
                inner = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                if isinstance(inner, _Cached):
                    plain: Any = inner.__wrapped__
                    stack.callback(setattr, holder, name, value)
                    setattr(holder, name, plain if inner is value else type(value)(plain))
                elif isinstance(inner, FunctionType):
                    for cell in inner.__closure__ or ():
                        _bypass_cell(cell, stack)
        yield


def _bypass_cell(cell: CellType, stack: ExitStack) -> None:
    """Put the function itself where a decorator closed over its cached form."""
    try:
        value = cell.cell_contents
    except ValueError:  # not filled yet
        return
    if isinstance(value, _Cached):
        stack.callback(setattr, cell, "cell_contents", value)
        cell.cell_contents = value.__wrapped__


def _holders(model: nn.Module) -> list[Any]:
    """Classes of a model and the modules of source code that they are from, but for torch's."""
    classes = {
        cls
        for kind in {type(module) for module in model.modules()}
        for cls in kind.__mro__
        if cls.__module__.partition(".")[0] not in ("torch", "builtins")
    }
    files = {sys.modules.get(cls.__module__) for cls in classes}
    return [*classes, *(file for file in files if file is not None)]
