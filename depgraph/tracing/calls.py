"""What is recorded of a call of a module."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Path = tuple[Any, ...]
"""Keys and places that lead to a part of an output."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """Stands in a recorded call for a tensor that nothing in the model reads.

    Attributes
    ----------
    shape : tuple of int
        Which code may ask for all the same.
    dtype : torch.dtype
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __repr__(self) -> str:
        return "<a tensor that nothing reads>"


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Attributes
    ----------
    name : str
        Qualified name of the module, ``""`` for the model itself.
    start, end : int
        The nodes made during the call are ``trace.nodes[start:end]``.
    args, kwargs, output : object
        What the call took and gave back, with a ``torch.fx.Node`` in place of each traced tensor.
    depth : int
        How many recorded calls this one is nested in.
    output_classes : dict of tuple to type
        Dataclasses, named tuples and kinds of dicts that ``output`` holds as plain dicts, by the
        keys that lead to them.
    grad : bool
        Whether gradients were enabled when the call began.
    after : (tuple, dict) or None
        What the call took, as it left it, where there are objects in it (`tracing.objects`).
    """

    name: str
    start: int
    end: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    depth: int
    output_classes: dict[Path, type]
    grad: bool = False
    after: Any = None


def is_named_tuple(cls: type) -> bool:
    """Whether a class was made by ``collections.namedtuple`` or ``typing.NamedTuple``."""
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def plain(output: Any) -> Any:
    """Dataclasses, named tuples and dict-like outputs (``ModelOutput``) as dicts, at any depth."""
    parts = _parts(output)
    if parts is None:
        return output
    bare = {key: plain(value) for key, value in parts.items()}
    return type(output)(bare.values()) if type(output) in (list, tuple) else bare


def classes_in(output: Any, path: Path = ()) -> dict[Path, type]:
    """Where `plain` made a dict of something else, and of what."""
    parts = _parts(output)
    if parts is None:
        return {}
    found = {} if type(output) in (list, tuple, dict) else {path: type(output)}
    for key, value in parts.items():
        found |= classes_in(value, (*path, key))
    return found


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by name or place; None for what is none."""
    if isinstance(value, type):
        return None
    if is_named_tuple(type(value)):
        return dict(zip(value._fields, value, strict=True))
    if type(value) in (list, tuple):
        return dict(enumerate(value))
    if hasattr(value, "items"):
        return dict(value.items())
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None
