"""Nodes of a ``torch.fx`` graph: made quickly, and asked for gradients."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

_NONE: dict[str, Any] = {}


class NodeMaker:
    """A graph in the making, each node with a name of its own.

    ``Graph.create_node`` looks for symbolic numbers in all arguments and keeps a namespace by
    regular expressions, which takes longer than all else that is done for a node.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}

    def placeholder(self, name: str) -> fx.Node:
        """A node for an argument of the graph."""
        name = self._unused(_NO_IDENTIFIER.sub("_", name))
        return self._insert(name, "placeholder", name, (), {})

    def get_attr(self, name: str) -> fx.Node:
        """A node for an attribute of the graph's module."""
        return self._insert(self._unused(name), "get_attr", name, (), {})

    def call(self, target: Any, args: Any, kwargs: dict[str, Any] = _NONE) -> fx.Node:
        """A node for a call of a function."""
        name = self._unused(getattr(target, "_opname", None) or target.__name__)
        return self._insert(name, "call_function", target, args, kwargs)

    def _unused(self, base: str) -> str:
        name = base
        while name in self._names:
            self._counts[base] = count = self._counts.get(base, 0) + 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def _insert(
        self, name: str, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        graph = self.graph
        node = fx.Node(graph, name, op, target, args, kwargs)
        graph._insert(node)
        graph._find_nodes_lookup_table.insert(node)
        graph._len += 1
        return node


def needs_gradients(node: fx.Node) -> bool:
    """Whether what a node computes would need gradients: something that it follows from does."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta["val"]
        if node.op != "call_function":
            if node.meta.get("gradients", (value is not None and value.requires_grad,))[0]:
                return True
        elif _passes_gradients(node, value):
            stack.extend(node.all_input_nodes)
    return False


def _passes_gradients(node: fx.Node, value: Any) -> bool:
    if not node.meta.get("grad", True) or node.target is torch.ops.aten.detach.default:
        return False
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


_NO_IDENTIFIER = re.compile(r"\W|^(?=\d)")
