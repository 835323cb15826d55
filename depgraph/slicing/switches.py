"""Proves of a module and its sliced copy that they agree with every switch of theirs turned.

What a trace does not show is the other mode, and what a flag (``fused_attn``) chooses instead. Both
modules are traced with each of these turned, and must need the same weights multiplied as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from depgraph.coupling.attention import number_of
from depgraph.plan import Factor
from depgraph.rescaling.homogeneous import Weights
from depgraph.rescaling.temperature import change, make_up
from depgraph.slicing.verify import computing, kind, numbers
from depgraph.tracing.modules import structural_copy
from depgraph.tracing.trace import Trace, TraceError, trace_forward

Switch = Callable[[nn.Module], Any]
"""Turns something in a module."""

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a call."""


_OTHER_WAY = {"sdpa": "eager", "eager": "sdpa"}


def agree_when_switched(
    modules: tuple[nn.Module, nn.Module],
    given: tuple[Given, Given],
    inner: str,
    expected: Iterable[Factor],
) -> bool:
    """Whether a module and its sliced copy agree in the other mode and with flags turned.

    Parameters
    ----------
    modules : tuple of nn.Module
        The original and the sliced one; they stay as they are.
    given : tuple
        What each is called with.
    inner : str
        The module within these whose flags are turned.
    expected : iterable of Factor
        By what parameters of the sliced one, by local names, will be multiplied.
    """
    made = list(expected)
    try:
        switches = _switches(modules[0], given[0], inner)
    except TraceError:
        return False  # it needs values to run, which the whole model has at hand
    for switch in switches:
        try:
            before = _traced(modules[0], given[0], switch)
        except (TraceError, AttributeError):
            continue  # the original does not run like that either
        try:
            after = _traced(modules[1], given[1], switch)
        except (TraceError, AttributeError):
            return False
        changes = _changes(before, after)
        if changes is None or not make_up(Weights(before), changes, made):
            return False
    return True


def _switches(module: nn.Module, given: Given, inner: str) -> list[Switch]:
    """The mode, each flag that the module reads, and how transformers' models are told to attend.

    A flag that a forward does not read would not change it.
    """

    def turn(name: str) -> Switch:
        def turned(copy: nn.Module) -> None:
            owner = copy.get_submodule(inner)
            setattr(owner, name, not getattr(owner, name))

        return turned

    def attend(copy: nn.Module) -> None:
        config: Any = copy.get_submodule(inner).config
        config._attn_implementation = _OTHER_WAY[config._attn_implementation]

    own = vars(module.get_submodule(inner))
    read, modes = _read(module, given, inner)
    flags = [key for key, value in own.items() if isinstance(value, bool) and key[0] != "_"]
    switches: list[Switch] = [lambda copy: copy.train(not copy.training)] if modes else []
    switches += [turn(key) for key in flags if key != "training" and key in read]
    if getattr(own.get("config"), "_attn_implementation", None) in _OTHER_WAY:
        switches.append(attend)
    return switches


def _read(module: nn.Module, given: Given, inner: str) -> tuple[set[str], bool]:
    """Names that a forward reads of a module, and whether it reads the mode of any."""
    copy = structural_copy(module)
    owner = copy.get_submodule(inner)
    cls: Any = type(owner)
    read: set[str] = set()

    def noted(self: nn.Module, name: str) -> Any:
        read.add(name)
        return cls.__getattribute__(self, name)

    owner.__class__ = type(cls.__name__, (cls,), {"__getattribute__": noted})
    traced = trace_forward(copy, *given)
    return read, bool(traced.mode_readers)


def _traced(module: nn.Module, given: Given, switch: Switch) -> Trace:
    copy = structural_copy(module)
    switch(copy)
    return trace_forward(copy, *given)


def _changes(before: Trace, after: Trace) -> dict[fx.Node, float] | None:
    """How much larger results are after than before; None where more than that has changed."""
    calls = [computing(trace) for trace in (before, after)]
    if len(calls[0]) != len(calls[1]) or any(
        constant.numel() == 1 for constant in before.constants.values()
    ):
        return None
    found = {}
    for old, new in zip(*calls, strict=True):
        if kind(old) != kind(new):
            return None
        if numbers(old) == numbers(new):
            continue
        number = number_of(new)
        if number is None or number_of(old) is None:
            return None
        found[old] = change(old, number)
    return found
