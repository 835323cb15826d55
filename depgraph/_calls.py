"""What is recorded of a call of a module."""

from __future__ import annotations

import dataclasses
from typing import Any


class Unread:
    """Stands in a recorded call for a tensor that nothing in the model reads."""

    def __repr__(self) -> str:
        return "<a tensor that nothing reads>"


UNREAD = Unread()


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
    output_class : type or None
        Dataclass, named tuple or kind of dict whose fields ``output`` holds; None for tensors and
        plain containers.
    """

    name: str
    start: int
    end: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    depth: int
    output_class: type | None


def is_named_tuple(cls: type) -> bool:
    """Whether a class was made by ``collections.namedtuple`` or ``typing.NamedTuple``."""
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def plain(output: Any) -> Any:
    """Dataclasses, named tuples and dict-like outputs (``ModelOutput``) as dicts, by field."""
    if is_named_tuple(type(output)):
        return dict(zip(output._fields, output, strict=True))
    if hasattr(output, "items"):
        return {name: plain(value) for name, value in output.items()}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return output
