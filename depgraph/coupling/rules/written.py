"""Recognises norms that a forward writes out in means, variances, roots and quotients.

A norm takes its statistics over what is kept, so it has to be one from end to end: what is scaled
must be the very value that the statistics were taken of, ``y * rsqrt(mean(x^2))`` is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from depgraph.coupling.propagate import arguments, op_name

_CASTS = ("to", "_to_copy", "float", "type_as")
_SAME_NUMBER = (*_CASTS, "expand", "expand_as", "unsqueeze")
"""Ops that hand on a statistic, in another type or shape."""


def normalises(node: fx.Node) -> bool:
    """Whether a mean or variance is a step of a norm that is written out.

    ``x - mean(x)`` that is scaled by its own deviation, and the deviation itself: the root of
    ``mean(x^2)`` or of a variance, by which nothing but x or ``x - mean(x)`` is scaled.

    Parameters
    ----------
    node : fx.Node
        A reduction.

    Returns
    -------
    bool
    """
    if _is(node, "mean"):
        squared = _squared(node.args[0])
        return _centres(node) if squared is None else _only_scales(node, [_value(squared)], False)
    if _is(node, "var", "std"):
        x = node.args[0]
        less = [("sub", _value(x), mean) for mean in _means(node)]
        return _only_scales(node, [_value(x), *less], _is(node, "std"))
    return False


def _means(variance: fx.Node) -> list[fx.Node]:
    """The means of what a variance is taken of, over the same dimensions."""
    x = _peeled(variance.args[0], _CASTS)
    dims = arguments(variance).get("dim")
    return [
        user
        for user in (_readers(x) if isinstance(x, fx.Node) else ())
        if _is(user, "mean") and arguments(user).get("dim") == dims
    ]


def _centres(mean: fx.Node) -> bool:
    """Whether a mean is only taken off what it is the mean of, to be scaled by its deviation."""
    x = _value(mean.args[0])
    scaled = False
    for user in _readers(mean):
        if not _is(user, "sub") or _value(user.args[0]) != x:
            return False
        for reader in _readers(user):
            if _is(reader, "mul", "div") and not _is_square(reader):
                scale = next((y for y in reader.args if _value(y) != _value(user)), None)
                if _deviates(scale) not in (x, _value(user)):
                    return False
                scaled = True
            elif not _is(reader, "var", "std") and not _is_square(reader):
                return False
    return scaled


def _only_scales(node: fx.Node, own: list[Any], rooted: bool) -> bool:
    """Whether everything that reads a statistic scales one of its own values by its root."""
    readers = list(_readers(node, _SAME_NUMBER))
    for user in readers:
        if _is(user, "mul", "div") and user.args[0] is not user.args[1]:
            others = [y for y in user.all_input_nodes if _peeled(y, _SAME_NUMBER) is not node]
            below = _is(user, "div") and _peeled(user.args[0], _SAME_NUMBER) is node
            if below or not rooted or len(others) != 1 or _value(others[0]) not in own:
                return False
        elif not _is_step(user) or not _only_scales(user, own, rooted or _is_root(user)):
            return False
    return bool(readers)


def _deviates(scale: Any) -> Any:
    """The value of whose variance or mean square this is the root; None for anything else."""
    rooted = False
    while isinstance(scale := _peeled(scale, _SAME_NUMBER), fx.Node):
        if _is(scale, "mean"):
            squared = _squared(scale.args[0])
            return _value(squared) if rooted and squared is not None else None
        if _is(scale, "var", "std"):
            return _value(scale.args[0]) if rooted or _is(scale, "std") else None
        if not _is_step(scale):
            return None
        rooted = rooted or _is_root(scale)
        scale = scale.args[0]
    return None


def _is_root(node: fx.Node) -> bool:
    return _is(node, "rsqrt", "sqrt") or (_is(node, "pow") and node.args[1] in (0.5, -0.5))


def _is_step(node: fx.Node) -> bool:
    """Whether an op leads from a statistic to a scale: a root, ``+ eps``, a reciprocal."""
    alone = len(node.all_input_nodes) == 1
    return _is_root(node) or (alone and _is(node, "add", "clamp", "clamp_min", "reciprocal"))


def _value(node: Any) -> Any:
    """What tells values apart: their node past casts, and for a difference its two sides."""
    node = _peeled(node, _CASTS)
    if isinstance(node, fx.Node) and _is(node, "sub") and len(node.all_input_nodes) == 2:
        return ("sub", _value(node.args[0]), _peeled(node.args[1], _SAME_NUMBER))
    return node


def _peeled(node: Any, ops: tuple[str, ...]) -> Any:
    while isinstance(node, fx.Node) and _is(node, *ops):
        node = node.args[0]
    return node


def _readers(node: fx.Node, past: tuple[str, ...] = _CASTS) -> Iterator[fx.Node]:
    """Users, past ops that hand the value on."""
    for user in node.users:
        if _is(user, *past) and user.args[0] is node:
            yield from _readers(user, past)
        else:
            yield user


def _squared(node: Any) -> Any:
    """What a value is the square of; None where it is no square."""
    node = _peeled(node, _CASTS)
    return node.args[0] if isinstance(node, fx.Node) and _is_square(node) else None


def _is_square(node: fx.Node) -> bool:
    if _is(node, "pow"):
        return bool(node.args[1] == 2)
    return _is(node, "square") or (_is(node, "mul") and node.args[0] is node.args[1])


def _is(node: Any, *names: str) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return op_name(node).rstrip("_") in {f"aten.{name}" for name in names}
