"""Follows the features of a layer through ops that only move them, by running those on numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph.coupling.propagate import arguments, op_name

MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("permute", "transpose", "t", "expand", "contiguous", "clone", "alias"),
        *("select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk"),
    )
)
"""Ops whose results hold entries of their first operand, and nothing else."""


_LIKE_ANOTHER: dict[str, Callable[..., Tensor]] = {
    "aten.reshape_as": Tensor.reshape,
    "aten.view_as": Tensor.reshape,
    "aten.expand_as": Tensor.expand,
}
"""Moves that take a shape from their second operand."""


@dataclass(frozen=True)
class Sink:
    """An op that reads features and does more than move them.

    Attributes
    ----------
    node : fx.Node
    source : fx.Node
        The operand that holds the features.
    labels : Tensor
        LongTensor of the operand's shape: the number of the feature at each entry.
    """

    node: fx.Node
    source: fx.Node
    labels: Tensor


def sinks(node: fx.Node, dim: int) -> list[Sink]:
    """Everything that reads the features along one dimension of a value.

    Parameters
    ----------
    node : fx.Node
        Of an exported program, with the value's shape in its ``meta``.
    dim : int

    Returns
    -------
    list of Sink
        In order of the graph. A mean over other dimensions counts as a move: it commutes with any
        factor and shift by feature.
    """
    size = shape_hint(node)
    if size is None:
        return []
    labels = torch.arange(size[dim])
    labels = labels.reshape([-1 if i == dim % len(size) else 1 for i in range(len(size))])
    return list(_walk(node, labels.expand(size)))


def _walk(node: fx.Node, labels: Any) -> Iterator[Sink]:
    for user in node.users:
        if _reads_shape(user, node):
            continue
        moved = _moved(user, node, labels)
        if moved is not None:
            yield from _walk(user, moved)
        elif isinstance(labels, Tensor):
            yield Sink(user, node, labels)
        else:  # several results, of which this op says not which it reads
            yield from (Sink(user, node, part) for part in labels)


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether an op looks at nothing of a value but its shape."""
    name = op_name(user) if user.op == "call_function" else ""
    return name == "aten.sym_size" or (name in _LIKE_ANOTHER and user.args[0] is not node)


def _moved(user: fx.Node, node: fx.Node, labels: Any) -> Any:
    """The labels of an op's result; None where the op does more than move them."""
    if user.op != "call_function" or not user.args or user.args[0] is not node:
        return None
    if user.target is operator.getitem:
        index: Any = user.args[1]
        return labels[index] if isinstance(labels, (tuple, list)) else None
    if not isinstance(labels, Tensor):
        return None
    if op_name(user) in _LIKE_ANOTHER:
        return _LIKE_ANOTHER[op_name(user)](labels, shape_hint(user))
    others = (user.args[1:], user.kwargs)
    if op_name(user) == "aten.mean" and arguments(user).get("dim"):
        return _averaged(user, labels)
    if op_name(user) not in MOVES or any(
        isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)
        for x in pytree.tree_leaves(others)
    ):
        return None
    args, kwargs = map_arg(others, lambda x: hint(x.meta.get("val")))
    return user.target(labels, *args, **kwargs)  # type: ignore[operator]


def _averaged(user: fx.Node, labels: Tensor) -> Tensor | None:
    a = arguments(user)
    low, high = (f(labels, a["dim"], a["keepdim"]) for f in (torch.amin, torch.amax))
    return low if torch.equal(low, high) else None


def hint(value: Any) -> Any:
    """A number for a size that is only known when the program runs: that of its example."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def shape_hint(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a value for the example; None for what is no tensor."""
    value = node.meta.get("val")
    return tuple(map(hint, value.shape)) if isinstance(value, Tensor) else None
