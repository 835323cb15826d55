"""Objects that a module is given to keep something in, such as a cache of keys and values.

A forward reads and changes their attributes, which no op tells of. So they are opened: taken for
containers of their attributes, as they are at some moment; the object of a later moment, or of a
trace, is another one.
"""

from __future__ import annotations

import keyword
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.tracing.alike import UnlikeError, plain_key


@dataclass(frozen=True)
class _Kind:
    """Class and names of attributes; which object it was matters to nothing that compares."""

    cls: type
    names: tuple[str, ...]
    source: Any = field(compare=False, repr=False)


class Opened:
    """What an object held at some moment.

    Attributes
    ----------
    cls : type
    fields : dict of str to object
        Its attributes, opened themselves.
    source : object
        The object itself, which may have changed since.
    """

    def __init__(self, cls: type, fields: dict[str, Any], source: Any) -> None:
        self.cls = cls
        self.fields = fields
        self.source = source


def _keyed(value: Opened) -> tuple[list[tuple[Any, Any]], _Kind]:
    kind = _Kind(value.cls, tuple(value.fields), value.source)
    return [(pytree.GetAttrKey(name), item) for name, item in value.fields.items()], kind


def _flattened(value: Opened) -> tuple[list[Any], _Kind]:
    items, kind = _keyed(value)
    return [item for _, item in items], kind


def _unflattened(items: Any, kind: _Kind) -> Opened:
    return Opened(kind.cls, dict(zip(kind.names, items, strict=True)), kind.source)


pytree.register_pytree_node(Opened, _flattened, _unflattened, flatten_with_keys_fn=_keyed)


class Absent:
    """Stands for an attribute that is not there; the class itself does."""


def own_attributes(module: nn.Module) -> Opened:
    """What a module keeps in its attributes now, beside tables and what it has registered."""
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and type(value) is not dict and _is_name(name)
    }
    return Opened(type(module), opened(own), module)


def _is_name(name: Any) -> bool:
    """Whether an attribute can be written in code."""
    return type(name) is str and name.isidentifier() and not keyword.iskeyword(name)


def keeps_state(value: Any) -> bool:
    """Whether a leaf is an object whose attributes are all that it has."""
    if isinstance(value, _OTHERS) or type(value).__module__.partition(".")[0] in _PLAIN_MODULES:
        return False
    names = getattr(value, "__dict__", None)
    if type(names) is not dict or not all(map(_is_name, names)):
        return False
    try:
        plain_key(value)
    except UnlikeError:
        return True
    return False


_OTHERS = (
    *(Tensor, nn.Module, fx.Node, type, types.FunctionType, types.MethodType, types.ModuleType),
    *(dict, list, tuple, set, frozenset, str, int, float, BaseException),
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN_MODULES = ("builtins", "torch", "depgraph", "collections", "functools")


def opened(value: Any) -> Any:
    """A container with every object that keeps something in it opened, to any depth.

    One that is met again, within itself or beside, stays as it is.
    """
    return _opened(value, set())


def _opened(value: Any, met: set[int]) -> Any:
    def open_leaf(leaf: Any) -> Any:
        if not keeps_state(leaf) or id(leaf) in met:
            return leaf
        met.add(id(leaf))
        return Opened(type(leaf), {k: _opened(v, met) for k, v in vars(leaf).items()}, leaf)

    return pytree.tree_map(open_leaf, value)


def is_opened(value: Any) -> bool:
    """Whether a value is an opened object."""
    return isinstance(value, Opened)


def closed(value: Any) -> Any:
    """A container with a new object in place of every opened one."""
    return pytree.tree_map(_close, value, is_leaf=is_opened)


def _close(value: Any) -> Any:
    return made_object(value.cls)(closed(value.fields)) if isinstance(value, Opened) else value


def made_object(cls: type) -> Callable[[dict[str, Any]], Any]:
    """Makes an object of its attributes."""

    def made(fields: dict[str, Any]) -> Any:
        new = cls.__new__(cls)  # type: ignore[call-overload]
        vars(new).update(fields)
        return new

    made.__name__ = made.__qualname__ = f"make_{cls.__name__}"
    return made


def structure(value: Any) -> Any:
    """What kind of containers a value is made of, with the objects in it."""
    return pytree.tree_structure(opened(value))


Found = dict[int, tuple[tuple[Any, ...], Opened]]


def objects_in(value: Any, path: tuple[Any, ...] = ()) -> Found:
    """Opened objects, outer ones first, with pytree's keys to each, by the object's identity."""

    def is_next(item: Any) -> bool:
        return isinstance(item, Opened) and item is not value

    found: Found = {id(value.source): (path, value)} if isinstance(value, Opened) else {}
    leaves, _ = pytree.tree_flatten_with_path(value, is_leaf=is_next)
    for keys, item in leaves:
        if isinstance(item, Opened):
            found |= objects_in(item, (*path, *keys))
    return found
