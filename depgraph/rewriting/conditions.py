"""Writes the function that says whether a call is one that a rewritten forward was made for."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depgraph.rewriting.given import OWN, Given, GivenTensor, Symbol, spelled
from depgraph.tracing.objects import Absent, objects_in, structure
from depgraph.tracing.trace import Trace

Fits = Callable[..., bool]

_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


class Conditions:
    """The text of one such function, line by line; ``self`` is the module."""

    def __init__(self, signature: inspect.Signature) -> None:
        self._held: dict[str, Any] = {
            "Tensor": Tensor,
            "torch": torch,
            "math": math,  # as guards are printed
            "int_like": _is_int,
        }
        self._head = self._signature(signature)
        self._lines: list[str] = []

    def take(self, given: Given) -> None:
        """Ask for what a call gives: kinds, types, sizes, and equal values of what is no tensor."""
        own = given.bound.arguments.get(OWN)
        items = {name: x for name, x in given.bound.arguments.items() if name != OWN}
        for name, value in {} if own is None else own.fields.items():
            if value is Absent:
                self._need(f"{name!r} not in self.__dict__")
            else:
                self._need(f"{name!r} in self.__dict__")
                items[f"self.{name}"] = value
        for name, value in items.items():
            if not pytree.tree_is_leaf(value) and not pytree.tree_leaves(value):
                self._need(f"not {name}")
            elif not pytree.tree_is_leaf(value):
                look = structure if objects_in(value) else pytree.tree_structure
                spec = self._hold(pytree.tree_structure(value))
                self._need(f"{self._hold(look)}({name}) == {spec}")
        for path, leaf in given.leaves():
            if leaf is Absent:
                continue
            text = spelled(path)
            if id(leaf) in given.tensors:
                self._tensor(text, path, given.tensors[id(leaf)])
            elif path in given.numbers:
                self._need(f"int_like({text})")
                self._lines.append(f"n{given.numbers[path].number} = {text}")
            elif leaf is None or isinstance(leaf, bool):
                self._need(f"{text} is {leaf}")
            else:
                self._need(f"{self._hold(same_value)}({text}, {self._hold(leaf)})")
        self._sizes(given)

    def gradients(self, given: Given, needed: Mapping[str, bool]) -> None:
        """Ask for the same inputs and parameters that need gradients."""
        for tensor in given.tensors.values():
            if not tensor.unread:
                text = spelled(tensor.places[0])
                answer = f"({text}.requires_grad, {text}.is_leaf)"
                self._need(f"{answer} == {tensor.gradients}")
        for name, wanted in needed.items():
            self._need(f"{attribute(name, 'requires_grad')} is {wanted}")

    def autocast(self, given: Given, autocast: tuple[str, torch.dtype] | None) -> None:
        """Ask for the same types that ops choose for themselves."""
        first = next((t for t in given.tensors.values()), None)
        if first is not None:
            text = f"{self._hold(autocast_at)}({spelled(first.places[0])})"
            self._need(f"{text} == {self._hold(autocast)}")

    def module(self, modes: Iterable[tuple[str, bool]], types: Iterable[tuple[str, Any]]) -> None:
        """Ask for modes of modules and types of tensors, by their names within the module."""
        for name, mode in modes:
            self._need(f"{attribute(name, 'training')} is {mode}")
        for name, dtype in types:
            self._need(f"{attribute(name, 'dtype')} is {self._hold(dtype)}")

    def values(self, given: Given, trace: Trace, buffers: Mapping[str, Tensor]) -> None:
        """Ask for the values that the forward has looked at, in inputs and buffers."""
        asked = {node for read in trace.reads for node in (*read.inputs, *read.buffers)}
        names = {node: name for name, node in trace.tensors.items()}
        for node, tensor in zip(trace.inputs, given.tensors.values(), strict=True):
            if node in asked and tensor.value is not None:
                self._need_equal(spelled(tensor.places[0]), tensor.value)
        for node in asked - set(trace.inputs):
            module, _, key = names[node].rpartition(".")
            self._need_equal(attribute(module, key), buffers[names[node]])

    def _need_equal(self, text: str, value: Tensor) -> None:
        held = self._hold(value.detach().cpu().clone())
        self._need(f"{self._hold(_equal)}({text}, {held})")

    def flags(self, flags: Mapping[tuple[str, str], float]) -> None:
        """Ask for the same rates and switches of the module and of what it holds."""
        for (name, key), value in flags.items():
            self._need(f"{attribute(name, key)} == {self._hold(value)}")

    def guards(self, guards: Iterable[str]) -> None:
        """Ask for conditions on the symbols."""
        for guard in guards:
            self._need(guard)

    def compiled(self) -> Fits:
        """The function."""
        source = "\n    ".join([f"def forward({self._head}):", *self._lines, "return True"])
        exec(compile(source, "<depgraph: conditions of a rewritten forward>", "exec"), self._held)
        made: Fits = self._held["forward"]
        return made

    def _need(self, text: str) -> None:
        self._lines.append(f"if not ({text}): return False")

    def _hold(self, value: Any) -> str:
        if isinstance(value, torch.dtype):
            return str(value)
        for name, held in self._held.items():
            if held is value:
                return name
        name = f"held_{len(self._held)}"
        self._held[name] = value
        return name

    def _tensor(self, text: str, path: Any, given: GivenTensor) -> None:
        if path != given.places[0]:
            self._need(f"{text} is {spelled(given.places[0])}")
            return
        self._need(f"isinstance({text}, Tensor)")
        if not given.unread or given.sizes:
            self._need(f"{text}.dtype is {given.dtype} and {text}.dim() == {len(given.sizes)}")

    def _sizes(self, given: Given) -> None:
        """Sizes after kinds, so that asking for them is safe; each symbol at its first place."""
        known = {symbol.number for symbol in given.numbers.values()}
        for tensor in given.tensors.values():
            text = spelled(tensor.places[0])
            for dim, (size, dense) in enumerate(zip(tensor.sizes, tensor.dims, strict=True)):
                if not isinstance(dense, Symbol):
                    self._need(f"{text}.size({dim}) == {size}")
                    continue
                name, asked = f"n{dense.number}", f"{text}.size({dim})"
                first = dense.number not in known
                known.add(dense.number)
                times = "" if dense.kept == 1 else f" * {dense.kept}"
                if first:
                    by = "" if dense.kept == 1 else f" // {dense.kept}"
                    self._lines.append(f"{name} = {asked}{by}")
                if times or not first:
                    self._need(f"{asked} == {name}{times}")

    def _signature(self, signature: inspect.Signature) -> str:
        parts = ["self"]
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in "".join(
                part[:1] for part in parts
            ):
                parts.append("*")
            star = _STARS.get(parameter.kind, "")
            default = parameter.default
            given = "" if default is parameter.empty else f"={self._hold(default)}"
            parts.append(f"{star}{parameter.name}{given}")
        return ", ".join(parts)


def attribute(module: str, name: str) -> str:
    """Code for an attribute of a module within ``self``, or for one of its tensors."""
    text = "self"
    for part in [*filter(None, module.split(".")), name]:
        plain = part.isidentifier() and not keyword.iskeyword(part)
        text = f"{text}.{part}" if plain else f"getattr({text}, {part!r})"
    return text


def autocast_at(tensor: Tensor) -> tuple[str, torch.dtype] | None:
    """The kind of device on which autocast is on where a tensor is, and to what type."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return kind, torch.get_autocast_dtype(kind)


def autocast_of(leaves: Iterable[tuple[Any, Any]]) -> tuple[str, torch.dtype] | None:
    """The same for the first tensor among arguments."""
    first = next((leaf for _, leaf in leaves if isinstance(leaf, Tensor)), None)
    return None if first is None else autocast_at(first)


def same_value(value: Any, expected: Any) -> bool:
    """Whether an argument that is no tensor is the one that a forward was written for."""
    return value is expected or (type(value) is type(expected) and bool(value == expected))


def _equal(value: Tensor, expected: Tensor) -> bool:
    """Whether a tensor holds what it did when a forward was written; on meta, where none does."""
    return value.is_meta or torch.equal(value.detach().cpu(), expected)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
