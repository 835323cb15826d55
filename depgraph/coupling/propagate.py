"""Walks a trace once, giving every dimension of every value an axis; the rules do the work.

A rule reads the axes of an op's operands, joins those that the op makes equal, and returns the axes
of its result. An op without a rule freezes what it touches, with the op's name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from depgraph.coupling.algebra import Algebra
from depgraph.coupling.axes import Axis, axis_atoms, axis_size
from depgraph.tracing.trace import Trace, shape

Axes = list[Axis]
Rule = Callable[["Propagation", fx.Node], "Axes | list[Axes]"]

NeedsUnits = Callable[["Propagation", fx.Node], Iterable[Axis]]
"""The axes, among those that an op sees, that it cannot work on once no unit of them is left."""

RULES: dict[str, Rule] = {}
"""Rule by op name without overload, ``"aten.linear"``; `rule` adds to it."""

_NEEDS_UNITS: dict[str, NeedsUnits] = {}


def everything(p: Propagation, node: fx.Node) -> list[Axis]:
    """Axes of all operands and results: for ops that may refuse empty tensors, or worse."""
    values = [p.axes(value) for value in (*node.all_input_nodes, node)]
    return [axis for axes in (*values, *p.results(node)) for axis in axes]


def lost(p: Propagation, node: fx.Node) -> list[Axis]:
    """Axes of operands that are not in the result, for ops that pass on what they are given."""
    made = (axis for axes in (p.axes(node), *p.results(node)) for axis in axes)
    left = {atom for axis in made for atom in axis_atoms(axis)}
    given = (axis for operand in node.all_input_nodes for axis in p.axes(operand))
    return [axis for axis in given if not left.issuperset(axis_atoms(axis))]


def nothing(p: Propagation, node: fx.Node) -> list[Axis]:
    """No axes, for ops that pass on and add up: a sum over nothing is zero."""
    return []


def rule(*ops: str, needs_units: NeedsUnits = everything) -> Callable[[Rule], Rule]:
    """Register a rule for ops, by name without overload.

    Parameters
    ----------
    *ops : str
        ``"aten.linear"``, or ``"my_library.my_op"``.
    needs_units : callable
        Which axes cannot be emptied; `everything`, `lost` or `nothing`, or a function like these.

    Examples
    --------
    >>> @rule("my_library.scale_rows")
    ... def _(p, node):
    ...     return p.axes(node.args[0])
    >>> _ = RULES.pop("my_library.scale_rows")
    """

    def register(function: Rule) -> Rule:
        RULES.update((op, function) for op in ops)
        _NEEDS_UNITS.update((op, needs_units) for op in ops)
        return function

    return register


@dataclass(frozen=True)
class Coupling:
    """Two dimensions that an op made the same.

    Attributes
    ----------
    op : fx.Node
        The node that joined them.
    first, second : tuple of (fx.Node, int)
        A value and one of its dimensions.
    """

    op: fx.Node
    first: tuple[fx.Node, int]
    second: tuple[fx.Node, int]


class Propagation:
    """State of one walk: the algebra, the axes of each value and the couplings found.

    Parameters
    ----------
    trace : Trace
    seeds : mapping of fx.Node to list of Axis, optional
        Axes of tensors and inputs that are known from another walk.
    algebra : Algebra, optional
        Of that walk, which then sees what this one finds equal.
    called : collection of str
        Modules that run in another mode only.

    Attributes
    ----------
    opaque_values : set of fx.Node
        Of whose dimensions no rule says what they are.
    """

    def __init__(
        self,
        trace: Trace,
        seeds: Mapping[fx.Node, Axes] | None = None,
        algebra: Algebra | None = None,
        called: Collection[str] = (),
    ) -> None:
        self.trace = trace
        self.algebra = algebra or Algebra()
        self.couplings: list[Coupling] = []
        self.opaque_values: set[fx.Node] = set()
        self._dims: dict[fx.Node, Axes] = {}
        self._results: dict[fx.Node, list[Axes]] = {}
        self._resolved: dict[fx.Node, Axes] = {}  # as of so many bindings:
        self._resolved_at = 0
        self._seed(seeds or {}, {*called, *(call.name for call in trace.calls)})

    def _seed(self, seeds: Mapping[fx.Node, Axes], called: set[str]) -> None:
        trace = self.trace
        batch = self.algebra.new(trace.batch, "batch of the model's inputs")
        for node in trace.inputs:
            axes = [
                self.algebra.new(size, f"dimension {dim} of the model's input")
                for dim, size in enumerate(shape(node))
            ]
            self._dims[node] = [batch, *axes[1:]] if trace.batch > 1 else axes
        for name, node in trace.tensors.items():
            frozen = None
            value = node.meta["val"]
            if not (value.is_floating_point() or value.is_complex()):
                frozen = f"'{name}' holds integers, which may be indices"
            elif name not in trace.parameters and name.rpartition(".")[0] not in called:
                frozen = f"buffer '{name}' belongs to a module that is never called as one"
            self._dims[node] = [self.algebra.new(size, frozen) for size in shape(node)]
        for node in trace.nodes:
            if node.op == "get_attr":
                self._dims[node] = self.new(node, "of a tensor that the forward holds unregistered")
        self._dims.update(seeds)

    def axes(self, node: Any) -> Axes:
        """Resolved axes of a value's dimensions; none for a number or for several results."""
        if not isinstance(node, fx.Node):
            return []
        if self._resolved_at != self.algebra.bindings:
            self._resolved.clear()
            self._resolved_at = self.algebra.bindings
        axes = self._resolved.get(node)
        if axes is None:
            axes = [self.algebra.resolve(axis) for axis in self._dims.get(node, [])]
            if node in self._dims:
                self._resolved[node] = axes
        return axes.copy()

    def results(self, node: fx.Node) -> list[Axes]:
        """Resolved axes of each result of an op that returns several."""
        resolve = self.algebra.resolve
        return [[resolve(axis) for axis in axes] for axes in self._results.get(node, [])]

    def join(self, op: fx.Node, first: tuple[fx.Node, int], second: tuple[fx.Node, int]) -> None:
        """Make a dimension of one value the same as one of another, because ``op`` says so."""
        left, right = (self._dims[node][dim] for node, dim in (first, second))
        if first != second:
            self.couplings.append(Coupling(op, first, second))
        if axis_size(self.algebra.resolve(left)) == axis_size(self.algebra.resolve(right)):
            self.algebra.unify(left, right, self.label(op))

    def equate(
        self,
        op: fx.Node,
        place: tuple[fx.Node, int],
        axis: Axis,
        source: tuple[fx.Node, int] | None = None,
    ) -> None:
        """Make a dimension of a value the same as an axis, which is that of ``source``, if any."""
        if source is not None and source != place:
            self.couplings.append(Coupling(op, place, source))
        node, dim = place
        self.algebra.unify(self._dims[node][dim], axis, self.label(op))

    def freeze(self, node: Any, reason: str, dims: Sequence[int] | None = None) -> None:
        """No index of these dimensions (all by default) of a value may be removed."""
        axes = self.axes(node) or [axis for result in self.results(node) for axis in result]
        for dim in range(len(axes)) if dims is None else dims:
            self.algebra.freeze(axes[dim], reason)

    def label(self, op: fx.Node) -> str:
        """The op and the module that ran it, for people."""
        owner = self.trace.owner.get(op)
        return f"{op_name(op)} in '{owner}'" if owner else op_name(op)

    def new(self, node: fx.Node, frozen: str | None = None) -> Axes:
        """Fresh axes for a value."""
        return [self.algebra.new(size, frozen) for size in shape(node)]

    def run(self, outputs_are_fixed: bool = True) -> None:
        """Apply the rules in the order of the trace, then freeze the outputs."""
        for node in self.trace.nodes:
            if node.op == "call_function":
                result = self._apply(node)
                if isinstance(node.meta.get("val"), (tuple, list)):
                    self._results[node] = result
                else:
                    self._dims[node] = result
        for read in self.trace.reads:
            self.freeze(read.node, f"its values are read ({read.source})")
        for node in self.trace.outputs if outputs_are_fixed else ():
            self.freeze(node, "dimension of the model's outputs")

    def _apply(self, node: fx.Node) -> Any:
        function = find_rule(node)
        if function is None:
            reason = f"no rule for the op {self.label(node)}{_source(node)}; depgraph.rule adds one"
            return self._give_up(node, reason)
        result = function(self, node)
        if isinstance(node.meta.get("val"), torch.Tensor):
            sizes = tuple(axis_size(self.algebra.resolve(axis)) for axis in cast(Axes, result))
            if sizes != shape(node):
                return self._give_up(
                    node, f"the rule of {self.label(node)} covers other uses{_source(node)}"
                )
        return result

    def _give_up(self, node: fx.Node, reason: str) -> Any:
        for operand in node.all_input_nodes:
            self.freeze(operand, reason)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            sizes = [tuple(getattr(item, "shape", ())) for item in value]
            return [self.opaque(node, size, reason) for size in sizes]
        return self.opaque(node, shape(node), reason)

    def opaque(self, node: fx.Node, sizes: Sequence[int], reason: str) -> Axes:
        """Frozen axes of a result; a leading dimension as long as an operand's is taken to be it.

        If that is the batch, or the batch times something: so a forward that is generated from here
        on still runs on other batches.
        """
        axes = [self.algebra.new(int(size), reason) for size in sizes]
        self.opaque_values.add(node)
        batch = self._dims[self.trace.inputs[0]][0] if self.trace.batch > 1 else ()
        for x in node.all_input_nodes:
            leading = self.axes(x)[0] if self.axes(x) else ()
            led = bool(batch) and leading[: len(batch)] == batch
            if led and sizes[:1] == (axis_size(leading),):
                self.algebra.freeze(leading, reason)
                return [leading, *axes[1:]]
        return axes


def _source(node: fx.Node) -> str:
    """Where the model's code calls an op, for people."""
    line = node.meta.get("source")
    return f" ({line})" if line else ""


def op_name(node: fx.Node) -> str:
    """``"aten.linear"`` for ``aten.linear.default``; the own name of any other function."""
    target = node.target
    name = _op_names.get(target)
    if name is None:
        if isinstance(target, torch._ops.OpOverload):
            name = f"{target.namespace}.{target._opname}"
        else:
            name = getattr(target, "__name__", str(target))
        _op_names[target] = name
    return name


_op_names: dict[Any, str] = {}


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a node's op: its own, that of the op it does in place, or that of its tag."""
    return RULES.get(_registered(node))


def units_needed(p: Propagation, node: fx.Node) -> Iterable[Axis]:
    """Axes that a node cannot work on once no unit of them is left."""
    return _NEEDS_UNITS.get(_registered(node), everything)(p, node)


def _registered(node: fx.Node) -> str:
    """The name under which the rule of a node is registered, if any is."""
    name = op_name(node)
    if name in RULES:
        return name
    names = (name.rstrip("_"), *(["pointwise"] if _is_pointwise(node.target) else []))
    return next((known for known in names if known in RULES), name)


def _is_pointwise(target: Any) -> bool:
    """Whether torch tags an op as pointwise, or the op that it does in place."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    packet = getattr(torch.ops.aten, target._opname.rstrip("_"), None)
    ops = [target, getattr(packet, target._overloadname, target)]
    return any(torch.Tag.pointwise in op.tags for op in ops)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by their schema names, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return dict(node.kwargs)
    if target not in _schemas:
        known = target._schema.arguments
        defaults = {a.name: a.default_value for a in known if a.has_default_value()}
        _schemas[target] = (tuple(a.name for a in known), defaults)
    names, defaults = _schemas[target]
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


_schemas: dict[Any, tuple[tuple[str, ...], dict[str, Any]]] = {}
"""Names of the arguments of an op, and the defaults that it has."""
