"""Records the calls of a model's modules, each that is alike an earlier one without its forward."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.module import _has_any_global_hook

from depgraph.tracing.alike import Likeness, UnlikeError
from depgraph.tracing.blocks import (
    Arguments,
    Block,
    Given,
    Made,
    check_inside,
    mapped,
    names_in,
    output_of,
    tensors_within,
    writes,
)
from depgraph.tracing.calls import ModuleCall
from depgraph.tracing.meta import copied_unseen
from depgraph.tracing.source import source_line

if TYPE_CHECKING:
    from depgraph.tracing.recorder import Recorder


class Repeats:
    """The calls of one recorder's model that later ones may be like."""

    def __init__(self, recorder: Recorder, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self._recorder = recorder
        self._likeness = Likeness(model)
        self._names = {id(module): name for name, module in modules.items()}
        self._blocks: dict[Any, Block] = {}
        self._used: dict[int, tuple[nn.Module, int]] = {}
        self._changes = 0

    def changed(self) -> None:
        """An attribute of a module was set: what was found alike may be so no more."""
        self._changes += 1
        self._likeness.forget()

    def mode_read(self, name: str) -> None:
        """Some code asked a module for its mode."""
        self._recorder.mode_read(name)

    def call(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record a call of a module, or repeat that of one which is alike."""
        try:
            number = self._likeness.of(module)
            given = Arguments(args, kwargs, self._seen)
        except UnlikeError:
            return self._recorder.call(name, module, args, kwargs)
        modes = (torch.is_grad_enabled(), torch._C._is_any_autocast_enabled())
        key = (number, modes, given.key)
        block = None if _has_any_global_hook() else self._blocks.get(key)
        if block is None:
            return self._first(key, name, module, args, kwargs, given)
        self._used[id(module)] = (module, number)
        self._used[id(block.module)] = (block.module, number)
        return self._repeat(block, module, given)

    def _seen(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor."""
        if not tensor.is_meta:
            raise UnlikeError
        node = self._recorder.node(tensor)
        if node.op == "placeholder" and node not in self._recorder.inputs:
            raise UnlikeError  # a parameter, which may be the module's own as well
        return node

    def _first(
        self, key: Any, name: str, module: nn.Module, args: Any, kwargs: Any, given: Arguments
    ) -> Any:
        """Record a call, for others to be like it where it can be repeated."""
        recorder = self._recorder
        changes, written = self._changes, len(recorder.written)
        reads = len(recorder.read_from)
        start, calls = len(recorder.nodes), len(recorder.calls)
        before = [recorder.node(tensor) for tensor in given.tensors]
        source = source_line()
        output = recorder.call(name, module, args, kwargs)
        if changes != self._changes or _has_any_global_hook():
            return output
        outside = _Outside(recorder, module, given, before, recorder.written[written:])
        inside = set(recorder.nodes[start:])
        if not all(map(inside.issuperset, recorder.read_from[reads:])):
            return output  # it may do other things for other values
        with contextlib.suppress(UnlikeError):
            if not given.can_change or Arguments(args, kwargs, self._seen).key == given.key:
                self._blocks[key] = outside.block(start, recorder.calls[calls:], output, source)
        return output

    def _repeat(self, block: Block, module: nn.Module, given: Arguments) -> Any:
        """Record a block for another module and other arguments; what the module gives back."""
        recorder = self._recorder
        outside = {"own": tensors_within(module), "given": given.tensors}
        new = {node: recorder.node(outside[kind][i]) for node, (kind, i) in block.roles.items()}
        here, source = len(recorder.nodes), source_line()
        if block.writes:
            recorder.values.wrote()
        for node in block.nodes:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), new.__getitem__)
            again = new[node] = recorder.make.call(node.target, args, kwargs)
            again.meta = dict(node.meta)
            if node.meta.get("source") == block.source:  # of the line that calls the module
                again.meta["source"] = source
            recorder.nodes.append(again)
        output = self._results(block, outside, new)
        for (kind, i), node in block.rebound:
            tensor = outside[kind][i]
            recorder.written.append((tensor, recorder.node(tensor), new[node]))
            recorder.node_of[id(tensor)] = new[node]
        self._repeat_calls(block, module, here, new)
        return output

    def _results(
        self, block: Block, outside: dict[str, list[Tensor]], new: dict[fx.Node, fx.Node]
    ) -> Any:
        made: dict[int, Tensor] = {}

        def result(value: Any) -> Any:
            if isinstance(value, Given):
                kind, i = value.role
                return outside[kind][i]
            if not isinstance(value, Made):
                return value
            if id(value.tensor) not in made:
                tensor = made[id(value.tensor)] = copied_unseen(value.tensor)
                self._recorder.put(new[value.node], tensor)
            return made[id(value.tensor)]

        return mapped(block.output, result)

    def _repeat_calls(
        self, block: Block, module: nn.Module, here: int, new: dict[fx.Node, fx.Node]
    ) -> None:
        names = names_in(block.module, module, self._names)
        depth = len(self._recorder.stack) - block.calls[-1].depth

        def moved(value: Any) -> Any:
            return new[value] if isinstance(value, fx.Node) else value

        for call in block.calls:
            self._recorder.calls.append(
                ModuleCall(
                    names[call.name],
                    call.start - block.start + here,
                    call.end - block.start + here,
                    mapped(call.args, moved),
                    mapped(call.kwargs, moved),
                    mapped(call.output, moved),
                    call.depth + depth,
                    call.output_classes,
                    call.grad,
                )
            )

    def are_proven(self) -> bool:
        """Whether all modules that were found alike still are, at the end of the forward.

        One that has changed in a way that no one was told of (in a list that it holds, say) may
        have been unlike when it was called.
        """
        self._likeness.forget()
        try:
            return all(self._likeness.of(m) == number for m, number in self._used.values())
        except UnlikeError:
            return False


class _Outside:
    """What a call found when it began: its arguments and its module's tensors, with their nodes."""

    def __init__(
        self,
        recorder: Recorder,
        module: nn.Module,
        given: Arguments,
        before: list[fx.Node],
        written: list[tuple[Tensor, fx.Node, fx.Node]],
    ) -> None:
        self._recorder = recorder
        self._module = module
        self._written = written
        self._roles: dict[fx.Node, tuple[str, int]] = {}
        self._role_of: dict[int, tuple[str, int]] = {}
        was: dict[int, fx.Node] = {}
        for tensor, node, _ in written:
            was.setdefault(id(tensor), node)
        for i, tensor in enumerate(tensors_within(module)):
            self._note(tensor, was.get(id(tensor), recorder.node_of.get(id(tensor))), ("own", i))
        for i, (tensor, node) in enumerate(zip(given.tensors, before, strict=True)):
            self._note(tensor, node, ("given", i))

    def _note(self, tensor: Tensor, node: fx.Node | None, role: tuple[str, int]) -> None:
        self._role_of.setdefault(id(tensor), role)
        if node is not None:
            self._roles.setdefault(node, role)

    def block(self, start: int, calls: list[ModuleCall], output: Any, source: str) -> Block:
        """What the call did, in terms of what it found.

        Raises
        ------
        UnlikeError
            When it used anything else, or did what cannot be repeated.
        """
        recorder = self._recorder
        nodes = recorder.nodes[start:]
        inside = set(nodes)
        check_inside(nodes, calls, {*inside, *self._roles})
        rebound = []
        for tensor, was, node in self._written:
            if node.args[0] is not was or torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
                raise UnlikeError
            if id(tensor) in self._role_of:
                rebound.append((self._role_of[id(tensor)], node))

        def made(tensor: Tensor) -> fx.Node | None:
            node = recorder.node_of.get(id(tensor))
            return node if node in inside else None

        result = output_of(output, made, self._role_of)
        writing = any(map(writes, nodes))
        return Block(
            self._module, start, nodes, self._roles, rebound, calls, result, writing, source
        )
