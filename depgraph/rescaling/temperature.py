"""Makes up in the weights for the temperature of an attention whose head dims are cut.

A fused attention takes its scale from the width that it sees, and code that writes attention out
computes one from it: with d' of d head dims left it is too high by ``(d / d') ** 0.5``. What makes
the queries is multiplied by ``(d' / d) ** 0.5``, and every number that says the old width is set to
the new one, so that all of a module's ways to compute the attention agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isclose

from torch import Tensor, fx, nn

from depgraph.coupling.attention import AttentionProduct, attention_products, number_of
from depgraph.coupling.axes import Atom, axis_atoms, axis_size
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.plan import Factor
from depgraph.rescaling.homogeneous import Weights
from depgraph.rescaling.masks import PASSING

_POWERS = (-0.5, 0.5, -0.25, 0.25)
"""Of the head dim: the usual scale, its inverse, and their roots, for queries and keys each."""

_OF_SCORES = {"scale", "scaling", "temperature", "temp", "tau", "factor", "sqrt", "norm", "inv"}
_OF_OTHERS = {"drop", "dropout", "prob", "p", "rate", "eps", "momentum", "ratio", "slope"}
"""Words in the names of floats that are about scores, and about something else."""


@dataclass
class Rescaling:
    """What lets a module keep its own forward.

    Attributes
    ----------
    numbers : dict of fx.Node to float
        Calls of the trace that compute with another number than before.
    attributes : dict of str to dict
        Floats to set, by module.
    factors : list of Factor
    """

    numbers: dict[fx.Node, float] = field(default_factory=dict)
    attributes: dict[str, dict[str, float]] = field(default_factory=dict)
    factors: list[Factor] = field(default_factory=list)


class Temperatures:
    """The attentions of a model that lose query dims, and what makes up for it.

    Parameters
    ----------
    p : Propagation
    sizes : mapping of Atom to int
        Units left of each pruned atom.
    modules : mapping of str to nn.Module
        Of the model, before it is cut.
    told : bool
        Whether the scale of a fused attention changes where it is told one that says the width.
    """

    def __init__(
        self,
        p: Propagation,
        sizes: Mapping[Atom, int],
        modules: Mapping[str, nn.Module],
        told: bool = False,
    ) -> None:
        self._p = p
        self._sizes = sizes
        self._modules = modules
        self._told = told
        self.weights = Weights(p.trace)

    @cached_property
    def cut(self) -> dict[str, list[AttentionProduct]]:
        """Attentions that lose query dims, by the module that runs them."""
        found: dict[str, list[AttentionProduct]] = {}
        for product in attention_products(self._p):
            if any(atom in self._sizes for atom in axis_atoms(product.query_dim)):
                found.setdefault(self._p.trace.owner.get(product.node, ""), []).append(product)
        return found

    def widths(self, name: str) -> tuple[tuple[int, int], ...]:
        """Query dims before and after, of each attention that a module runs."""
        axes = [product.query_dim for product in self.cut.get(name, [])]
        return tuple((axis_size(axis), axis_size(axis, self._sizes)) for axis in axes)

    def rescaling(self, name: str) -> Rescaling | None:
        """What makes up for the cut in one of the modules of `cut`; None where nothing can."""
        result = self.changed(name)
        if result is not None:
            changes = {node: change(node, number) for node, number in result.numbers.items()}
            found = factors(self.weights, changes)
            if found is None:
                return None
            result.factors = found
        return result

    def changed(self, name: str) -> Rescaling | None:
        """The numbers and floats that say the width, without factors; None where it is unclear."""
        result = Rescaling()
        products = self.cut.get(name, [])
        for product, (before, after) in zip(products, self.widths(name), strict=True):
            if not after:
                return None
            owners = {name}
            for node in values_before(product.node):
                if _is_number(node):
                    return None  # a tensor that may have been made of the width
                number = number_of(node)
                power = None if number is None else _power(number, before)
                if number is None or power is None:
                    continue
                if self._told or not _is_given(node):
                    result.numbers[node] = _at_width(number, before, after, power)
                    owners.add(self._p.trace.owner.get(node, ""))
            if result.numbers and not self._set_floats(owners, before, after, result):
                return None
        return result

    def _set_floats(self, names: set[str], before: int, after: int, result: Rescaling) -> bool:
        """Note the floats that say the width; whether it is clear which do."""
        for name in names:
            for attribute, value in vars(self._modules[name]).items():
                power = _power(value, before) if type(value) is float else None
                words = set(attribute.lower().split("_"))
                if power is None or words & _OF_OTHERS:
                    continue
                if not words & _OF_SCORES:
                    return False
                new = _at_width(value, before, after, power)
                result.attributes.setdefault(name, {})[attribute] = new
        return True


def change(node: fx.Node, number: float) -> float:
    """How many times larger a result is with another number in its op."""
    ratio = number / (number_of(node) or 1.0)
    return 1 / ratio if op_name(node) == "aten.div" else ratio


def factors(weights: Weights, changes: Mapping[fx.Node, float]) -> list[Factor] | None:
    """What to multiply of which weights, so that these changes of results change nothing else.

    Parameters
    ----------
    weights : Weights
        Of the trace.
    changes : mapping of fx.Node to float
        See `change`.

    Returns
    -------
    list of Factor, or None
        None where no weights can be proven to do so.
    """
    made: list[Factor] = []
    left = dict(changes)
    while left:
        node, by = next(iter(left.items()))
        alike = [other for other, value in left.items() if value == by]
        for nodes in ([node], alike):  # several may read the same weights: a module called twice
            found = _behind(weights, nodes)
            if found is not None:
                made += [(name, mask, 1 / by) for name, mask in found.items()]
                break
        else:
            return None
        left = {other: value for other, value in left.items() if other not in nodes}
    return made


def make_up(weights: Weights, changes: Mapping[fx.Node, float], given: Iterable[Factor]) -> bool:
    """Whether these factors make up for these changes of results, and change nothing else."""
    left = list(given)
    for by in set(changes.values()):
        nodes = [node for node, value in changes.items() if value == by]
        masks: dict[str, Tensor] = {}
        for name, mask, factor in left:
            if isclose(factor * by, 1):
                masks[name] = masks[name] | mask if name in masks else mask
        left = [factor for factor in left if not isclose(factor[2] * by, 1)]
        if not masks or not any(
            weights.suffice(masks, {node: _scaled(node, operand) for node in nodes})
            for operand in ("query", "key")
        ):
            return False
    return not left


def _behind(weights: Weights, nodes: list[fx.Node]) -> dict[str, Tensor] | None:
    for operand in ("query", "key"):
        found = weights.behind({node: _scaled(node, operand) for node in nodes})
        if found is not None or not any("query" in arguments(node) for node in nodes):
            return found
    return None


def _scaled(node: fx.Node, operand: str) -> fx.Node:
    a = arguments(node)
    value: fx.Node = a[operand] if operand in a else a["self"]
    return value


def values_before(node: fx.Node) -> Iterator[fx.Node]:
    """An attention, and what its scores are made of, as far as its projections."""
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop()
        yield at
        if at is not node and op_name(at) not in _BEFORE_SCORES:
            continue
        a = arguments(at)
        near = [a["query"], a["key"]] if "query" in a else at.all_input_nodes
        if at is not node and any(x.op == "placeholder" for x in near):
            near = []  # a projection, or a factor that is learnt
        queue += [x for x in near if x not in seen and x.op != "placeholder"]
        seen.update(near)


_BEFORE_SCORES = PASSING | {"aten.masked_fill", "aten.where", "aten.baddbmm"}


def _is_number(node: fx.Node) -> bool:
    """Whether a value is a tensor of one number, which something is scaled by."""
    value = node.meta.get("val")
    scales = any(op_name(user) in ("aten.mul", "aten.div") for user in node.users)
    return isinstance(value, Tensor) and value.numel() == 1 and scales


def _is_given(node: fx.Node) -> bool:
    """Whether a fused attention is told its scale, which need not follow the width."""
    return arguments(node).get("scale") is not None


def _power(number: float, size: int) -> float | None:
    """Which of the powers of a size a number is; None where it is none of them."""
    found = (power for power in _POWERS if isclose(number, size**power, rel_tol=1e-6))
    return next(found, None) if size > 1 else None


def _at_width(number: float, before: int, after: int, power: float) -> float:
    """The number for another width; to the last digit where the model computes it by a power."""
    return after**power if number == before**power else number * (after / before) ** power


def multiply(tensor: Tensor, mask: Tensor, factor: float) -> None:
    """Multiply the entries in a mask, which is broadcast, in place and rounded once."""
    if not tensor.is_meta:
        tensor.mul_((1 + mask.double() * (factor - 1)).to(tensor.device))
