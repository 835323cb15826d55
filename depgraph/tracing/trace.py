"""From an ``nn.Module`` to a flat ``torch.fx`` graph of ATen ops, without reading a weight.

The forward runs once on meta tensors, on a structural copy of the model: the caller's modules,
mode, hooks and caches are never touched, and a model of any size or device traces alike. Every
parameter and buffer is one placeholder (tied ones share it), and every module call is recorded with
the range of nodes that it made.
"""

from __future__ import annotations

import dataclasses
import dis
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depgraph.errors import DepgraphError
from depgraph.tracing.caches import Cache, caches_bypassed, filled, filling, forget, remembering
from depgraph.tracing.calls import ModuleCall
from depgraph.tracing.collection import collection_paused
from depgraph.tracing.hooks import without_outsiders
from depgraph.tracing.modules import held_tensors, named_modules, named_tensors, structural_copy
from depgraph.tracing.objects import closed, opened
from depgraph.tracing.out_of_sight import OutOfSight
from depgraph.tracing.recorder import Recorder, UnknownTruth, UnknownValue
from depgraph.tracing.source import is_foreign, place
from depgraph.tracing.unread import Unread, alive_nodes, owners
from depgraph.tracing.values import Read, Values, reads_values

Maker = Callable[[Mapping[Any, bool]], Recorder]
"""Makes a recorder that knows the answers to what cannot be known."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced forward: ATen nodes, their placeholders and the module calls that made them.

    Where the forward runs ops whose results nobody reads, they are in `complete` alone: a trace
    that is a graph of its own, without calls.
    ``reads`` are the values that it took from the example, in order; ``modes_read`` says which
    modules asked for the mode of which; ``held`` where a module holds a constant unregistered: the
    module's name, the attribute, and places in the containers that the attribute is; ``assumed``
    are the nodes that pick as many entries as values say that differ from call to call, here all;
    ``gradients_read`` says whether the forward asked which tensors need gradients; ``hooked`` of
    which modules a hook may change ``"args"``, ``"output"`` or ``"both"`` (`tracing.hooks`);
    ``values`` knows what nodes hold that follow from no pixels and no weights; ``stored`` is what
    attributes of a module held before and after that its forward changes (`tracing.objects`).
    """

    nodes: tuple[fx.Node, ...]
    tensors: dict[str, fx.Node]
    parameters: frozenset[str]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    calls: tuple[ModuleCall, ...]
    owner: dict[fx.Node, str]
    example: tuple[Any, ...]
    modes: dict[str, bool]
    constants: dict[str, Tensor]
    mode_readers: frozenset[str]
    caches: frozenset[Cache]
    complete: Trace | None = None
    reads: tuple[Read, ...] = ()
    modes_read: frozenset[tuple[str, str]] = frozenset()
    held: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    assumed: frozenset[fx.Node] = frozenset()
    gradients_read: bool = False
    hooked: Mapping[str, str] = field(default_factory=dict)
    values: Values | None = None
    stored: Any = None

    @cached_property
    def asking(self) -> frozenset[fx.Node]:
        """Nodes that only lead to a value which the forward has read, and to no output."""
        return frozenset(self.nodes) - alive_nodes(self.nodes, (self.nodes[-1], *self.outputs))

    @property
    def returning(self) -> Trace:
        """The same without the ops for what the module only stores in its own attributes."""
        call = self.calls_of[""][-1]
        kept = pytree.tree_leaves((call.after, [(c.args, c.kwargs) for c in self.calls]))
        nodes = (node for node in kept if isinstance(node, fx.Node))
        reads = (read.node for read in self.reads)
        alive = alive_nodes(self.nodes, (self.nodes[-1], *self.outputs, *reads, *nodes))
        return dataclasses.replace(self, nodes=tuple(n for n in self.nodes if n in alive))

    @property
    def inputs_read(self) -> frozenset[int]:
        """Places among the inputs of those whose values the forward has read."""
        read = {node for read in self.reads for node in read.inputs}
        return frozenset(i for i, node in enumerate(self.inputs) if node in read)

    @cached_property
    def calls_of(self) -> dict[str, list[ModuleCall]]:
        """The calls of each module, by its name, in the order in which they ended."""
        found: dict[str, list[ModuleCall]] = {}
        for call in self.calls:
            found.setdefault(call.name, []).append(call)
        return found

    @cached_property
    def calls_at(self) -> dict[tuple[int, int], ModuleCall]:
        """The call whose first node is at a place, by depth and place."""
        return {(c.depth, c.start): c for c in self.calls if c.start < c.end}

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The trace as a module of ATen calls that takes parameters, buffers and inputs."""
        return fx.GraphModule(self.constants, self.nodes[0].graph)

    @property
    def batch(self) -> int:
        """Size of the leading dimension that all inputs share, 1 where they share none."""
        sizes = {shape(node)[:1] for node in self.inputs}
        return int(sizes.pop()[0]) if len(sizes) == 1 and () not in sizes else 1


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor a node computes; empty for a scalar and for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


@collection_paused()
@torch.no_grad()
def trace_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], make: Maker = Recorder
) -> Trace:
    """Trace ``model(*args, **kwargs)`` to ATen ops.

    Parameters
    ----------
    model : nn.Module
        On any device, ``meta`` included, in either mode. It is not changed.
    args, kwargs : tuple, dict
        Tensors, real or meta, and plain values; containers of them are allowed.
    make : callable
        Makes the recorder.

    Returns
    -------
    Trace

    Raises
    ------
    DepgraphError
        When the forward raises, or branches on values that differ from call to call.

    Notes
    -----
    One forward on meta tensors. A module that must run the ops of an earlier one is not run again
    (`tracing.alike` says when that is so), nor an op that was seen before with the same shapes:
    time is linear in the number of ops, independent of widths. A value that the forward reads of a
    buffer, a mask or an integer input is that of the example (`depgraph.tracing.values`).
    """
    return _traced(model, args, kwargs, make)


@collection_paused()
def trace_with(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], make: Maker, grad: bool
) -> Trace:
    """Trace with recorders of another kind, while gradients are enabled or not.

    `trace_forward` says the rest, but that tensors and numbers among the arguments may have
    symbolic sizes (`depgraph.rewriting.raw`).
    """
    with torch.set_grad_enabled(grad):
        return _traced(model, args, kwargs, make)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], make: Maker) -> Trace:
    modes = {name: module.training for name, module in named_modules(model).items()}
    recorder, tensors, output, caches = _with_checks_passed(model, args, kwargs, make)
    outputs, nodes, calls = recorder.finish(output)
    traced = Trace(
        nodes,
        tensors,
        named_tensors(model)[1],
        tuple(recorder.inputs),
        outputs,
        tuple(calls),
        owners(nodes, calls),
        (args, kwargs),
        modes,
        recorder.constants,
        frozenset(recorder.mode_readers),
        caches,
        reads=tuple(recorder.reads),
        modes_read=frozenset(recorder.modes_read),
        held=recorder.held,
        assumed=frozenset(recorder.assumed),
        gradients_read=recorder.gradients_read,
        hooked=recorder.hooked,
        values=recorder.values,
        stored=recorder.stored,
    )
    return traced if recorder.unread is None else _completed(traced, recorder.unread)


def _completed(traced: Trace, unread: Unread) -> Trace:
    """A trace together with the one that has the ops whose results nobody reads."""
    copy = unread.copies.__getitem__
    complete = dataclasses.replace(
        traced,
        nodes=unread.nodes,
        tensors={name: copy(node) for name, node in traced.tensors.items()},
        inputs=tuple(map(copy, traced.inputs)),
        outputs=tuple(map(copy, traced.outputs)),
        calls=(),
        owner=dict(unread.owner),
    )
    return dataclasses.replace(traced, complete=complete)


_Recorded = tuple[Recorder, dict[str, fx.Node], Any, frozenset[Cache]]


def _with_checks_passed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], make: Maker
) -> _Recorded:
    """What is recorded where every check of a value that cannot be known finds nothing wrong.

    A question is a check where the forward raises an error of its own after one of the two answers.
    """
    answers: dict[Any, bool] = {}
    while True:
        try:
            return _in_sight(model, args, kwargs, answers, make)
        except TraceError as error:
            asked = error.__cause__
            if not isinstance(asked, UnknownTruth) or asked.where in answers:
                raise
            passing = [
                answer
                for answer in (False, True)
                if not _complains(model, args, kwargs, {**answers, asked.where: answer}, make)
            ]
            if len(passing) != 1:
                raise
            answers[asked.where] = passing[0]


def _complains(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    answers: Mapping[Any, bool],
    make: Maker,
) -> bool:
    """Whether the forward raises an error of its own after these answers."""
    try:
        _in_sight(model, args, kwargs, answers, make)
    except TraceError as error:
        cause = error.__cause__
        return not isinstance(cause, UnknownValue) and _is_raised_by_code(cause)
    return False


def _is_raised_by_code(error: BaseException | None) -> bool:
    """Whether a ``raise`` or an ``assert`` in Python made an error, and no op of torch."""
    at = error.__traceback__ if error is not None else None
    if at is None:
        return False
    while at.tb_next is not None:
        at = at.tb_next
    return dis.opname[at.tb_frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"


def _in_sight(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    answers: Mapping[Any, bool],
    make: Maker,
) -> _Recorded:
    """What is recorded, with what torch does past its dispatcher where the forward needs that.

    Tables that the forward fills anew are empty at first: what an earlier call left in them is not
    made from the parameters any more.
    """
    tables = remembering(model)
    if tables:
        try:
            recorded = _seen(model, args, kwargs, partial(make, answers), tables)
        except TraceError:
            return _seen(model, args, kwargs, partial(make, answers))
        if tables <= recorded[3]:
            return recorded
    return _seen(model, args, kwargs, partial(make, answers))


def _seen(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    make: Callable[[], Recorder],
    emptied: frozenset[Cache] = frozenset(),
) -> _Recorded:
    try:
        recorded = _recorded(model, args, kwargs, make(), emptied=emptied)
    except TraceError as error:
        if isinstance(error.__cause__, UnknownValue):
            raise
        recorded = _recorded(model, args, kwargs, make(), OutOfSight, emptied=emptied)
    if recorded[0].repeats is not None and not recorded[0].repeats.are_proven():
        recorded = _recorded(model, args, kwargs, make(), OutOfSight, False, emptied)
    return recorded


def _recorded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: Recorder,
    sight: Callable[[Recorder], AbstractContextManager[Any]] = nullcontext,
    alike: bool = True,
    emptied: frozenset[Cache] = frozenset(),
) -> _Recorded:
    """A recorder that has seen one forward, the tensors' nodes by name, output and caches."""
    model = structural_copy(model)
    recorder.hooked = without_outsiders(model)
    forget(model, emptied)
    alike = alike and recorder.can_repeat
    attributes = held_tensors(model)
    recorder.looked_up = frozenset(attributes) if recorder.looks_up else frozenset()
    tensors = {
        name: recorder.placeholder(name, tensor) for name, tensor in named_tensors(model)[0].items()
    }
    _put_on_meta(model, recorder)
    # objects are copied with what they hold now: the forward may change them
    given = pytree.tree_map_only(Tensor, recorder.input, opened((args, kwargs)))
    meta_args, meta_kwargs = closed(given)
    entries = filling(model)
    recorder.begin(model)
    recorder.below = sys._getframe()
    try:
        with recorder.watch(model, alike), caches_bypassed(model), sight(recorder):
            output = model(*meta_args, **meta_kwargs)
            recorder.end(model)
    except _FORWARD_ERRORS as error:
        where = f"in module '{recorder.current}'" if recorder.current else "in the model"
        line = _source_line(error)
        text = _on_data(recorder.running, line, error) + _way(model, recorder, error) or (
            f"{_first_line(error)}{line}; check the example inputs"
        )
        raise TraceError(
            recorder.current,
            f"the forward could not be traced {where} ({type(model).__name__}): {text}",
        ) from error
    recorder.held = {
        name: attributes[id(tensor)]
        for name, tensor in recorder.constants.items()
        if id(tensor) in attributes
    }
    caches = filled(entries)
    forget(model, caches)  # what they hold makes no module unlike another
    return recorder, tensors, output, caches


class TraceError(DepgraphError):
    """A forward raised; says in which module."""

    def __init__(self, module: str, text: str) -> None:
        super().__init__(text)
        self.module = module


_FORWARD_ERRORS = (
    RuntimeError,  # NotImplementedError among them
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,  # a temperature of a width that is zero, say
)


def _on_data(op: Any, line: str, error: BaseException) -> str:
    """What is wrong where an op looks at the values of a tensor; nothing for other ops."""
    if isinstance(error, UnknownValue) or reads_values(op):
        does, way = "reads the value of a tensor", "a branch on it with torch.where"
    elif torch.Tag.dynamic_output_shape in getattr(op, "tags", ()):
        does, way = "gives a shape that depends on the data", "it with a mask of fixed shape"
    else:
        return ""
    return f"{op.namespace}.{op._opname}{line} {does}; replace {way}"


def _way(model: nn.Module, recorder: Recorder, error: BaseException) -> str:
    """What else to do about code that is not the caller's own."""
    if not isinstance(error, UnknownValue):
        return ""
    if hasattr(model, "set_experts_implementation") and "experts" in recorder.current:
        return ", or call model.set_experts_implementation('batched_mm') before"
    done = [call.name for call in recorder.calls if call.name and call.depth == 1]
    parts = [
        name
        for name in dict.fromkeys(done)
        if next(model.get_submodule(name).parameters(), None) is not None
    ]
    return f", or trace the parts before it by themselves: {', '.join(parts)}" if parts else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _source_line(error: BaseException) -> str:
    """Where in the model's own code the error arose, and in what that calls, for the message."""
    own, inner, at = "", "", error.__traceback__
    while at is not None:
        if is_foreign(at.tb_frame):
            inner = place(at.tb_frame, at.tb_lineno)
            if isinstance(at.tb_frame.f_locals.get("self"), nn.Module):
                own = inner
        at = at.tb_next
    both = [own, inner] if own and own != inner else [inner] if inner else []
    return f" ({' by '.join(both)})" if both else ""


def _put_on_meta(model: nn.Module, recorder: Recorder) -> None:
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for key, tensor in registry.items():
                if tensor is not None:
                    registry[key] = recorder.stand_in(tensor)


__all__ = [
    "ModuleCall",
    "Trace",
    "TraceError",
    "named_tensors",
    "shape",
    "structural_copy",
    "trace_forward",
]
