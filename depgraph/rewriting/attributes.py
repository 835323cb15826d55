"""Finds what the integers of a module mean from the axes its forward works with.

``num_heads = 12`` in a module whose views have an axis ``heads`` of 12 is that axis. No list
of classes says so. Where several axes have the same size, those that the module's own views spell
out come first, and the caller tries the alternatives in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from depgraph.coupling.axes import Atom, Axis, axis_size
from depgraph.coupling.propagate import Propagation
from depgraph.rewriting.literals import literal_axes
from depgraph.tracing.trace import ModuleCall

_PARAMETER_SIZES: tuple[tuple[type[nn.Module], dict[str, tuple[str, int]]], ...] = (
    (nn.Linear, {"out_features": ("weight", 0), "in_features": ("weight", 1)}),
    (nn.modules.batchnorm._NormBase, {"num_features": ("weight", 0)}),
    (nn.GroupNorm, {"num_channels": ("weight", 0)}),
    (nn.PReLU, {"num_parameters": ("weight", 0)}),
    (nn.Embedding, {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)}),
)
"""What torch's own layers call the dimensions of their parameters."""

_OF_POSITIONS = frozenset(
    {
        "patch",
        "patches",
        "token",
        "tokens",
        "grid",
        "img",
        "image",
        "window",
        "seq",
        "len",
        "length",
        "pos",
        "kernel",
        "stride",
        "padding",
        "depth",
        "layer",
        "layers",
        "class",
        "classes",
        "prefix",
        "reg",
        "stage",
        "block",
        "blocks",
        "index",
        "size",
    }
)
"""Words in names of integers that count positions or layers, which no group is about."""

_OF_WIDTHS = frozenset({"hidden", "head", "embed", "embedding", "intermediate"})
"""Words before "size" that say it counts no positions: ``head_hidden_size``."""


def layer_attributes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int | None
) -> dict[str, Any]:
    """Attributes of torch's own layers, from the new shapes of their parameters.

    Parameters
    ----------
    module : nn.Module
    shapes : mapping of str to tuple of int
        New shape of each of the module's own parameters.
    groups : int or None
        New number of groups of a convolution or group norm; None where it stays.

    Returns
    -------
    dict
        Attributes to set; empty for any other module.
    """
    weight = shapes.get("weight")
    if isinstance(module, nn.GroupNorm) and groups is not None:
        return {"num_groups": groups, **({} if weight is None else {"num_channels": weight[0]})}
    if weight is None:
        return {}
    for cls, sizes in _PARAMETER_SIZES:
        if isinstance(module, cls):
            return {name: shapes[tensor][dim] for name, (tensor, dim) in sizes.items()}
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups if groups is None else groups
        inner, outer = (0, 1) if module.transposed else (1, 0)
        return {
            "groups": groups,
            "out_channels": weight[outer] * (groups if module.transposed else 1),
            "in_channels": weight[inner] * (1 if module.transposed else groups),
        }
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": weight}
    return {}


def own_integers(module: nn.Module) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Integers above 1 among a module's attributes, with the path of keys that leads to each.

    Parameters
    ----------
    module : nn.Module

    Yields
    ------
    path, value : tuple, int
        ``("num_heads",), 12`` or ``("feature_info", 0, "num_chs"), 768``.
    """
    for name, value in vars(module).items():
        if not name.startswith("_"):
            yield from _integers((name,), value)


def _integers(path: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], int]]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _integers((*path, i), item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from _integers((*path, key), item)


def candidates(
    p: Propagation,
    module: nn.Module,
    calls: list[ModuleCall],
    tensors: Mapping[str, fx.Node],
    sizes: Mapping[Atom, int],
) -> dict[tuple[Any, ...], list[int]]:
    """New values that each integer of a module may take, most likely first.

    Parameters
    ----------
    p : Propagation
        Of the whole model.
    module : nn.Module
    calls : list of ModuleCall
        Calls of this module.
    tensors : mapping of str to fx.Node
        Nodes of the parameters that the module itself holds.
    sizes : mapping of Atom to int
        Units left of each pruned atom.

    Returns
    -------
    dict of path to list of int
        Only integers that may change.
    """
    axes = list(_axes_of(p, calls, tensors))
    found: dict[tuple[Any, ...], list[int]] = {}
    for path, value in own_integers(module):
        new = [axis_size(axis, sizes) for axis in axes if axis_size(axis) == value]
        if not new:
            continue
        if _counts_positions(path):
            new.insert(0, value)
        options = list(dict.fromkeys(new))
        if options != [value]:
            found[path] = options
    return found


def _counts_positions(path: tuple[Any, ...]) -> bool:
    if path[0] == "unflattened_size":  # of nn.Unflatten, which parts channels as well as positions
        return False
    words = {word for key in path if isinstance(key, str) for word in key.lower().split("_")}
    if words & _OF_WIDTHS and not words & (_OF_POSITIONS - {"size"}):
        return False
    return not words.isdisjoint(_OF_POSITIONS) or "cfg" in words or "config" in words


def _axes_of(
    p: Propagation, calls: list[ModuleCall], tensors: Mapping[str, fx.Node]
) -> Iterator[Axis]:
    """Axes a module works with: spelled out by its views, then its own values, then its inputs."""
    own = [
        node
        for call in calls
        for node in p.trace.nodes[call.start : call.end]
        if p.trace.owner.get(node) == call.name and node.op == "call_function"
    ]
    for node in own:
        yield from literal_axes(p, node)
    for node in (*own, *tensors.values()):
        yield from p.axes(node)
    for call in calls:
        for value in (*call.args, *call.kwargs.values(), call.output):
            yield from p.axes(value)


def with_integer(value: Any, path: tuple[Any, ...], new: int) -> Any:
    """A container with the integer at ``path`` replaced; the original is not changed."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        return {**value, key: with_integer(value[key], tuple(rest), new)}
    items = list(value)
    items[key] = with_integer(items[key], tuple(rest), new)
    return type(value)(items)
