"""Ops that treat every element alike: operands are broadcast, equal dimensions become the same."""

from __future__ import annotations

from torch import fx

from depgraph.coupling.propagate import Axes, Propagation, arguments, lost, op_name, rule
from depgraph.coupling.rules.broadcast import broadcast
from depgraph.coupling.rules.select import places
from depgraph.tracing.trace import shape

_DROPOUTS = ("aten.dropout", "aten.alpha_dropout", "aten.feature_dropout")


def drops_nothing(node: fx.Node) -> bool:
    """Whether an op is a drop-out that gives back what it is given."""
    if op_name(node) not in _DROPOUTS:
        return False
    a = arguments(node)
    return not a["train"] or not a["p"]


@rule(
    "pointwise",  # every op that torch tags as pointwise
    *_DROPOUTS,
    "aten.bernoulli",
    "aten.contiguous",
    "aten.clone",
    "aten._to_copy",
    "aten.float",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.masked_fill",
    "aten.copy",
    "aten.lerp",
    "aten.complex",
    "aten.polar",
    "aten.real",
    "aten.imag",
    "aten.conj",
    "aten._conj",
    "aten.resolve_conj",
    "aten.where",
    "aten.fill",
    "aten.zero",
    "aten.rrelu",
    "aten.hardswish",
    "aten.hardsigmoid",
    "aten.hardtanh",
    "aten.relu6",
    "aten.selu",
    "aten.celu",
    "aten.elu",
    "aten.leaky_relu",
    "aten.mish",
    "aten.softplus",
    "aten.log_sigmoid",
    "aten.threshold",
    # other names of ops that are tagged
    "aten.multiply",
    "aten.divide",
    "aten.subtract",
    "aten.negative",
    "aten.absolute",
    "aten.fix",
    "aten.isclose",
    needs_units=lost,
)
def pointwise(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """All operands broadcast against each other; ``where`` of a condition alone finds places."""
    if isinstance(node.meta["val"], (tuple, list)):
        return places(p, node)
    return broadcast(p, node, [(x, len(shape(x))) for x in node.all_input_nodes])


@rule("aten.prelu", needs_units=lost)
def prelu(p: Propagation, node: fx.Node) -> Axes:
    """The slopes lie along dimension 1, or there is one for all."""
    x, slopes = node.all_input_nodes
    if shape(slopes) != (1,) and len(shape(x)) > 1:
        p.join(node, (x, 1), (slopes, 0))
    return p.axes(x)


@rule("aten.to", "aten.type_as", needs_units=lost)
def cast(p: Propagation, node: fx.Node) -> Axes:
    """Another dtype or device, perhaps those of a second operand, whose shape does not matter."""
    return p.axes(node.args[0])
