"""Writes what a forward changes in the objects that it is given, such as a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import getitem
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from depgraph.errors import DepgraphError
from depgraph.rewriting.symbols import SYMBOLIC
from depgraph.tracing.calls import ModuleCall, Unread
from depgraph.tracing.objects import Absent, Opened, is_opened, keeps_state, made_object, objects_in


class Changes:
    """The objects of one forward that is being written, and what they hold by now.

    Parameters
    ----------
    where : str
        The module, for people.
    graph : fx.Graph
    mapped : callable
        Gives a value of the trace in terms of the graph.
    """

    def __init__(self, where: str, graph: fx.Graph, mapped: Callable[[Any], Any]) -> None:
        self._where = where
        self._graph = graph
        self._mapped = mapped
        self._held: dict[int, Opened] = {}
        self._places: dict[int, Callable[[], fx.Node]] = {}
        self._nodes: dict[int, fx.Node] = {}

    def given(self, value: Opened, place: Callable[[], fx.Node]) -> None:
        """Note an object among the arguments, and where it is."""
        self._held[id(value.source)] = value
        self._places[id(value.source)] = place

    def node(self, source: Any) -> fx.Node:
        """An object of the trace.

        Raises
        ------
        DepgraphError
            For one that the forward makes, and gives to a child or back.
        """
        key = id(source)
        if key not in self._nodes:
            if key not in self._places:
                raise DepgraphError(
                    f"{self._where} makes a {type(source).__name__}, which its forward cannot do "
                    "once it is rewritten; call the model without one (use_cache=False), or leave "
                    "whole what it needs a rewritten forward for"
                )
            self._nodes[key] = self._places[key]()
        return self._nodes[key]

    def bring(self, value: Any) -> None:
        """Let the objects in a value of the trace hold what they do there."""
        for _, now in objects_in(value).values():
            before = self._held.get(id(now.source))
            if before is None:
                continue  # a new one, which `_built` makes where it is put
            self._held[id(now.source)] = now
            for name in before.fields.keys() - now.fields.keys():
                self._graph.call_function(delattr, (self.node(now.source), name))
            for name, item in now.fields.items():
                self._set(now.source, name, before.fields.get(name, Absent), item)

    def _set(self, source: Any, name: str, before: Any, item: Any) -> None:
        if isinstance(before, Opened) and isinstance(item, Opened):
            if before.source is item.source:
                return  # what has changed in it is brought there
        elif _same(before, item):
            return
        if type(item) in (list, dict) and type(item) is type(before):
            held = self._graph.call_function(getattr, (self.node(source), name))
            self._graph.call_function(refill, (held, self._built(item)))
        else:
            self._graph.call_function(setattr, (self.node(source), name, self._built(item)))

    def _built(self, item: Any) -> Any:
        """A value in terms of the graph, with objects that are new made anew."""
        if isinstance(item, Opened):
            key = id(item.source)
            if key not in self._held:
                fields = self._built(item.fields)
                self._nodes[key] = self._graph.call_function(made_object(item.cls), (fields,))
                self._held[key] = item
            return self.node(item.source)
        if type(item) in (list, tuple):
            return type(item)(map(self._built, item))
        if type(item) is dict:
            return {key: self._built(value) for key, value in item.items()}
        if keeps_state(item):
            return self.node(item)
        return self._mapped(item)

    def left(self, child: ModuleCall) -> Iterator[tuple[fx.Node, Callable[[], fx.Node]]]:
        """Take over what a child has left in objects.

        Yields
        ------
        node, place : fx.Node, callable
            A tensor of the trace, and what makes a node that finds it.
        """
        for _, now in objects_in(child.after).values():
            self._held[id(now.source)] = now
            leaves, _ = pytree.tree_flatten_with_path(now.fields, is_leaf=is_opened)
            for keys, leaf in leaves:
                find = partial(self._find, now.source, keys)
                if isinstance(leaf, Opened):
                    self._places.setdefault(id(leaf.source), find)
                elif isinstance(leaf, fx.Node):
                    yield leaf, find

    def _find(self, source: Any, keys: Sequence[Any]) -> fx.Node:
        """What an object holds: its attribute, or what is in that."""
        node = self._graph.call_function(getattr, (self.node(source), keys[0].key))
        for key in keys[1:]:
            part = key.idx if isinstance(key, pytree.SequenceKey) else key.key
            node = self._graph.call_function(getitem, (node, part))
        return node


def refill(held: Any, items: Any) -> None:
    """Put other items into a list or dict, which stays the same object."""
    held.clear()
    held.extend(items) if isinstance(held, list) else held.update(items)


def changes_in(before: Opened, after: Opened) -> tuple[Opened, Opened] | None:
    """What an object held in the attributes that have changed, before and after."""
    names = [n for n, x in after.fields.items() if not _same(before.fields.get(n, Absent), x)]
    if not names:
        return None
    was = {name: before.fields.get(name, Absent) for name in names}
    now = {name: after.fields[name] for name in names}
    return Opened(after.cls, was, after.source), Opened(after.cls, now, after.source)


def _same(before: Any, item: Any) -> bool:
    """Whether what an object holds at some place is still the same."""
    if isinstance(item, Unread) or before is item:
        return True  # what nothing reads by now is replaced before the end
    if isinstance(before, Opened) and isinstance(item, Opened):
        return before.source is item.source and changes_in(before, item) is None
    if type(before) is not type(item):
        return False
    if isinstance(item, (list, tuple)):
        return len(before) == len(item) and all(map(_same, before, item))
    if isinstance(item, dict):
        return before.keys() == item.keys() and all(_same(before[key], item[key]) for key in item)
    if isinstance(item, SYMBOLIC):
        return bool(before.node.expr == item.node.expr)
    return not isinstance(item, fx.Node) and not keeps_state(item) and bool(before == item)
