"""Which layers make the queries, keys and values of each attention, and which reads its result.

Read off the trace: the path from a layer to the attention must only move numbers about, so that
where each one ends up is found by sending their indices along it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor, fx

from depgraph import DependencyGraph, Group
from depgraph.coupling.attention import attention_products
from depgraph.coupling.propagate import arguments, op_name
from depgraph.tracing.trace import shape

_MOVES = frozenset(
    (
        *("aten.view", "aten.reshape", "aten.permute", "aten.transpose", "aten.t"),
        *("aten.unbind", "aten.select", "aten.chunk", "aten.split", "aten.split_with_sizes"),
        *("aten.unsqueeze", "aten.squeeze", "aten.flatten", "aten.unflatten", "aten.movedim"),
        *("aten.contiguous", "aten.clone", "aten.swapaxes"),
    )
)
_KEEPS = frozenset(("aten.dropout", "aten.to", "aten._to_copy", "aten.detach", "aten.alias"))


@dataclass(frozen=True)
class Part:
    """A layer and the rows (or columns) of it that belong to each head.

    Attributes
    ----------
    weight : str
        Name of the weight parameter.
    bias : tuple of str
        Parameters or buffers that the bias is a concatenation of; empty without one.
    index : LongTensor (heads, head_dim)
        Output row, or input column, of the weight.
    """

    weight: str
    bias: tuple[str, ...]
    index: Tensor


@dataclass(frozen=True)
class Attention:
    """One attention whose head dims nothing else reads: any basis of them is as good.

    Attributes
    ----------
    query_group, value_group : Group
        The units are the head dims of q and k, and those of v; one group where they are coupled.
    query, key, value, output : Part
    """

    query_group: Group
    value_group: Group
    query: Part
    key: Part
    value: Part
    output: Part


def find_attentions(graph: DependencyGraph) -> list[Attention]:
    """Every attention of a graph whose q, k, v and output are plain linear layers.

    Parameters
    ----------
    graph : DependencyGraph

    Returns
    -------
    list of Attention
        One with norms or rotations between layer and product, with shared layers, grouped queries
        or further members of its head dims is left out.
    """
    by_atom = {group._atom: group for group in graph.prunable if group.kind == "head_dim"}
    found = []
    for product in attention_products(graph.propagation):
        dims = (product.query_dim, product.value_dim)
        if op_name(product.node) != "aten.scaled_dot_product_attention":
            continue
        groups = [by_atom[dim[0]] for dim in dims if len(dim) == 1 and dim[0] in by_atom]
        attention = _attention(graph, product.node, *groups) if len(groups) == 2 else None
        if attention is not None:
            found.append(attention)
    return found


def _attention(
    graph: DependencyGraph, node: fx.Node, query_group: Group, value_group: Group
) -> Attention | None:
    a = arguments(node)
    paths = [_path_back(a[name]) for name in ("query", "key", "value")]
    ahead = _path_ahead(node)
    if ahead is None or any(path is None for path in paths):
        return None
    back = [path for path in paths if path is not None]
    output, reader = ahead
    inside = {step for path in back for step in path} | {node, reader, *output}
    sealed = all(set(step.users) <= inside for step in inside - {reader})
    parts = [_written(graph, path) for path in back]
    read = _read(graph, node, output, reader)
    if not sealed or read is None or any(part is None for part in parts):
        return None
    query, key, value = (part for part in parts if part is not None)
    attention = Attention(query_group, value_group, query, key, value, read)
    return attention if _is_whole(graph, attention) else None


def _is_whole(graph: DependencyGraph, attention: Attention) -> bool:
    """Whether the parts are all members the groups have, in the shape of heads by head dims."""
    parts = (attention.query, attention.key, attention.value, attention.output)
    known = {name for part in parts for name in (part.weight, *part.bias)}
    members = [
        member.parameter
        for group in (attention.query_group, attention.value_group)
        for member in (*group.members, *group.buffers)
    ]
    shapes = [tuple(part.index.shape) for part in parts]
    return known.issuperset(members) and shapes[0] == shapes[1] and shapes[2] == shapes[3]


def _path_back(node: fx.Node) -> list[fx.Node] | None:
    """From a linear layer to a node, both included; None when other ops come between."""
    path = [node]
    while op_name(path[0]) != "aten.linear":
        before = path[0].all_input_nodes
        if path[0].op != "call_function" or len(before) != 1 or not _passes(path[0]):
            return None
        path.insert(0, before[0])
    return path


def _path_ahead(node: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """The steps after a node, and the linear layer that reads them."""
    steps: list[fx.Node] = []
    at = node
    while len(at.users) == 1:
        at = next(iter(at.users))
        if op_name(at) == "aten.linear":
            return (steps, at) if arguments(at)["input"] is (steps or [node])[-1] else None
        if not _passes(at) or len(at.all_input_nodes) != 1:
            return None
        steps.append(at)
    return None


def _passes(node: fx.Node) -> bool:
    name = op_name(node)
    return name in _MOVES or name in _KEEPS or name == "getitem" or _is_scaling(node)


def _is_scaling(node: fx.Node) -> bool:
    return op_name(node) in ("aten.mul", "aten.div") and isinstance(node.args[1], Number)


def _replay(steps: list[fx.Node], start: fx.Node, value: Tensor) -> Any:
    """What the steps make of a value in place of the start node's."""
    values: dict[fx.Node, Any] = {start: value}
    for step in steps:
        before = values[step.all_input_nodes[0]]
        if op_name(step) in _KEEPS or _is_scaling(step):
            values[step] = before
            continue
        args = fx.map_arg(step.args, values.__getitem__)
        kwargs = fx.map_arg(step.kwargs, values.__getitem__)
        values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    return values[steps[-1]] if steps else value


def _written(graph: DependencyGraph, path: list[fx.Node]) -> Part | None:
    """The rows of the layer at the start of a path, as (heads, head_dim)."""
    layer = path[0]
    sizes = shape(layer)
    index = _replay(path[1:], layer, torch.arange(sizes[-1]).expand(sizes))
    part = _layer(graph, layer)
    return None if part is None or index.dim() != 4 else Part(*part, index[0, :, 0, :])


def _read(
    graph: DependencyGraph, node: fx.Node, steps: list[fx.Node], reader: fx.Node
) -> Part | None:
    """The columns of the layer that reads an attention, as (heads, head_dim)."""
    batch, heads, tokens, size = shape(node)
    codes = torch.arange(heads * size).reshape(heads, 1, size).expand(batch, heads, tokens, size)
    moved = _replay(steps, node, codes)
    columns = moved.reshape(-1, moved.shape[-1])[0]
    part = _layer(graph, reader)
    if part is None or len(columns) != heads * size or len(columns.unique()) != len(columns):
        return None
    return Part(*part, torch.argsort(columns).reshape(heads, size))


def _layer(graph: DependencyGraph, layer: fx.Node) -> tuple[str, tuple[str, ...]] | None:
    """Weight and bias names of a linear layer; None for what is computed or used elsewhere too."""
    names = {node: name for name, node in graph.traced.tensors.items()}
    a = arguments(layer)
    weight, bias = a["weight"], a["bias"]
    if weight not in names or len(weight.users) != 1:
        return None
    if bias is None:
        return names[weight], ()
    if op_name(bias) == "aten.cat" and len(bias.users) == 1:
        pieces = list(_cat_inputs(bias))
    else:
        pieces = [bias]
    if any(piece not in names or len(piece.users) != 1 for piece in pieces):
        return None
    return names[weight], tuple(names[piece] for piece in pieces)


def _cat_inputs(node: fx.Node) -> Iterator[fx.Node]:
    for piece in node.args[0]:  # type: ignore[union-attr]
        if isinstance(piece, fx.Node):
            yield piece
