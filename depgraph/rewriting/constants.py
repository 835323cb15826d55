"""What a generated forward computes from parameters and buffers alone is computed once, and kept.

A position bias gathered from its table, or a bias put together from parts, is the same at every
call until a parameter changes. It is kept only where no gradient is asked for; where one is, under
a compiler or a tracer, and on the meta device, it is computed at each call as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, getitem
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

_KEPT: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, tuple[Tensor, ...]]]] = WeakKeyDictionary()


def split_constants(graph: fx.Graph, attribute: str) -> tuple[fx.Graph, fx.Graph, list[str]] | None:
    """Take what only reads parameters and buffers out of a graph.

    Parameters
    ----------
    graph : fx.Graph
        Changed: it takes the constants from the property ``attribute``.
    attribute : str

    Returns
    -------
    graph : fx.Graph
        What is left.
    constants : fx.Graph
        Gives the tuple of them.
    names : list of str
        The parameters and buffers that they are computed from.

    None where there is no such op.
    """
    held: dict[fx.Node, None] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (
            _is_pure(node) and inputs and all(source in held for source in inputs)
        ):
            held[node] = None
    used = [
        node
        for node in held
        if node.op != "get_attr" and any(user not in held for user in node.users)
    ]
    if not used:
        return None
    constants = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in _needed(used, held):
        made[node] = constants.node_copy(node, made.__getitem__)
    constants.output(tuple(made[node] for node in used))
    names = [str(node.target) for node in made if node.op == "get_attr"]
    with graph.inserting_before(next(iter(graph.nodes))):
        source = graph.create_node("get_attr", attribute)
    with graph.inserting_after(source):
        for i, node in enumerate(used):
            node.replace_all_uses_with(graph.call_function(getitem, (source, i)))
    _hoist_placeholders(graph)
    for node in reversed(list(held)):
        if not node.users:
            graph.erase_node(node)
    return graph, constants, names


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _needed(used: Sequence[fx.Node], held: dict[fx.Node, None]) -> list[fx.Node]:
    """Nodes that the used ones come from, themselves among them, in the order of the graph."""
    needed, queue = set(used), list(used)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                queue.append(source)
    return [node for node in held if node in needed]


def _hoist_placeholders(graph: fx.Graph) -> None:
    """Arguments lead a graph, whatever was inserted before them."""
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        first.prepend(node)


def constants_property(
    compute: Callable[[nn.Module], tuple[Tensor, ...]], names: Sequence[str], attribute: str
) -> property:
    """A property that computes constants where a parameter has changed.

    Parameters
    ----------
    compute : callable
        Of the module.
    names : sequence of str
        Parameters and buffers that it reads, as dotted attributes.
    attribute : str
        Name of the property.
    """
    readers = [attrgetter(name) for name in names]

    def constants(self: nn.Module) -> tuple[Tensor, ...]:
        tensors = [read(self) for read in readers]
        # in-place changes count up the version, others change the place
        key = [(x.data_ptr(), x._version, x.dtype, x.device, _autocast(x)) for x in tensors]
        kept = _KEPT.setdefault(self, {})
        known = kept.get(attribute)
        if known is None or known[0] != key:
            known = kept[attribute] = (key, compute(self))
        return known[1]

    return property(constants)


def constants_readable(names: Sequence[str]) -> Callable[[nn.Module], bool]:
    """Whether constants of these parameters and buffers may be kept at this call, for a module."""
    readers = [attrgetter(name) for name in names]

    def readable(self: nn.Module) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        return all(_is_plain(read(self)) for read in readers)

    return readable


def _is_plain(tensor: Tensor) -> bool:
    """Whether changes of a tensor can be told from its place and version."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _autocast(tensor: Tensor) -> torch.dtype | None:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
