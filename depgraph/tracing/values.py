"""What tensors of a recorded forward hold, computed when the forward asks for a value.

The forward runs on tensors without data. A value that it branches on is computed from what the
value depends on: sizes, literals, buffers, and inputs that say how to read the others (integers,
booleans, and masks of zeros and ones). Pixels, embeddings and weights are not looked at: what
follows from them differs from call to call, or with every step of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from depgraph.tracing.blocks import writes
from depgraph.tracing.meta import CPU, unseen

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
}
"""Ops that give the program a tensor's value, beside those that torch tags so."""

_DECIDING: dict[str, tuple[str, ...]] = {
    "aten.index": ("indices",),
    "aten.masked_select": ("mask",),
    "aten.tensor_split": ("tensor_indices_or_sections",),
}
"""Arguments whose values decide the shape of a result; of other ops, all that are tensors do."""


_LIKE = (
    *(f"aten.{name}_like" for name in ("zeros", "ones", "full", "empty")),
    *(f"aten.new_{name}" for name in ("zeros", "ones", "full", "empty")),
)
_AS = ("aten.view_as", "aten.reshape_as", "aten.expand_as", "aten.type_as", "aten.to")
"""Ops that look at the shape or type alone of all operands, or of all but the first."""


@dataclass(frozen=True)
class Read:
    """A value that the traced forward took from the example, and that decided what it did.

    Attributes
    ----------
    node : fx.Node
        Of the tensor that was read. It stays in the trace, and all its dimensions stay whole.
    answer : object
        What was read: a number, a truth value, or a Tensor where values decided a shape.
    module : str
        Which module was running.
    source : str
        The line of code that asked.
    inputs, buffers : frozenset of fx.Node
        Inputs of the model, and its buffers, that the answer follows from.
    where : tuple of str
        The lines that led to a question of true or false, innermost first; none for a number.
    """

    node: fx.Node
    answer: Any
    module: str
    source: str
    inputs: frozenset[fx.Node]
    buffers: frozenset[fx.Node] = frozenset()
    where: tuple[str, ...] = ()


class Values:
    """Values of the nodes of one recorder.

    Parameters
    ----------
    nodes : list of fx.Node
        All that were recorded so far, in order; it grows.
    number : callable
        Makes a plain number of what an argument holds; other values stay.
    """

    def __init__(self, nodes: list[fx.Node], number: Callable[[Any], Any]) -> None:
        self._nodes = nodes
        self._number = number
        self._leaves: dict[fx.Node, Tensor] = {}
        self._found: dict[fx.Node, tuple[Tensor, frozenset[fx.Node]]] = {}
        self._writing = False
        self.unsure: set[fx.Node] = set()  # not even their shapes are known

    def know(self, node: fx.Node, tensor: Tensor) -> None:
        """A placeholder or an unregistered tensor has this value, if it has any."""
        if not tensor.is_meta:
            self._leaves[node] = tensor

    def wrote(self) -> None:
        """An op wrote to memory: what was found before may be so no more."""
        self._writing = True
        self._found.clear()

    def of(self, node: fx.Node) -> tuple[Tensor, frozenset[fx.Node]] | None:
        """The value of a node and all that it follows from; None where it cannot be known."""
        if node not in self._found:
            steps = self._steps(node)
            if steps is None:
                return None
            self._found[node] = (self._run(steps, node), frozenset(steps))
        return self._found[node]

    def _steps(self, node: fx.Node) -> list[fx.Node] | None:
        """The nodes that a value follows from, in order, with what wrote to their memory."""
        needed = self._needed_with_writes(node) if self._writing else _needed(node)
        shapes = {x for step in needed for x in step.all_input_nodes}
        if not all(map(self._is_known, needed)) or not self.unsure.isdisjoint(needed | shapes):
            return None
        return [step for step in self._nodes if step in needed]

    def _needed_with_writes(self, node: fx.Node) -> set[fx.Node]:
        needed, memory = {node}, _Memory(self._nodes)
        touched = {memory.of(node)}
        for step in reversed(self._nodes):
            if step in needed or (writes(step) and memory.of(step) in touched):
                found = (step, *_looked_at(step))
                needed.update(found)
                touched.update(map(memory.of, found))
        return needed

    def _is_known(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return node in self._leaves
        return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())

    def _run(self, steps: Sequence[fx.Node], wanted: fx.Node) -> Tensor:
        values: dict[fx.Node, Any] = {}

        def real(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return values[value] if value in values else self._shape_alone(value)
            return CPU if isinstance(value, torch.device) else self._number(value)

        changing = any(map(writes, steps))
        with unseen(), torch.no_grad():
            for step in steps:
                if step.op != "call_function":
                    value = self._leaves[step].detach().to(CPU)
                    values[step] = value.clone() if changing else value
                    continue
                args, kwargs = map_aggregate((step.args, dict(step.kwargs)), real)
                values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        found: Tensor = values[wanted]
        return found

    def _shape_alone(self, node: fx.Node) -> Tensor:
        """A tensor that looks like a node's, for an op that sees no more of it."""
        like = node.meta["val"]
        return torch.zeros((), dtype=like.dtype).expand(*map(self._number, like.shape))


def _needed(node: fx.Node) -> set[fx.Node]:
    """A node and all that it follows from, where nothing is written to."""
    needed, stack = {node}, [node]
    while stack:
        new = [x for x in _looked_at(stack.pop()) if x not in needed]
        needed.update(new)
        stack.extend(new)
    return needed


def _looked_at(node: fx.Node) -> list[fx.Node]:
    """Operands whose values matter to an op."""
    operands = node.all_input_nodes
    if not isinstance(node.target, torch._ops.OpOverload):
        return operands
    name = f"{node.target.namespace}.{node.target._opname}"
    return [] if name in _LIKE else operands[:1] if name in _AS else operands


class _Memory:
    """Which nodes may share memory, as the schemas of their ops tell."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._root: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for operand in _aliased(node):
                self._root[self.of(node)] = self.of(operand)

    def of(self, node: fx.Node) -> fx.Node:
        """One that stands for all that share memory with a node."""
        while (up := self._root.get(node, node)) is not node:
            node = up
        return node


def _aliased(node: fx.Node) -> Iterable[fx.Node]:
    """Operands whose memory a node's results may be in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.all_input_nodes if node.op == "call_function" else ()
    names = [a.name for a in schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    found: list[fx.Node] = []
    aliased = [given.get(a.name) for a in schema.arguments if a.alias_info is not None]
    map_arg(aliased, found.append)
    return found


def reads_values(func: Any) -> bool:
    """Whether an op gives the program a tensor's value: a number, or a truth value."""
    return torch.Tag.data_dependent_output in getattr(func, "tags", ()) or func in _READS


def tells_truth(func: Any, args: Sequence[Any]) -> bool:
    """Whether what an op reads is true or false, and no number."""
    truths = (torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
    return func in (*truths, torch.ops.aten.allclose.default) or args[0].dtype == torch.bool


def decides_by_values(func: Any) -> bool:
    """Whether the shape of an op's result may follow from the values of its operands."""
    tagged = torch.Tag.dynamic_output_shape in getattr(func, "tags", ())
    return tagged or func in _BY_VALUES or func._opname == "nms"


_BY_VALUES = {
    torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.tensor_split.tensor_indices_or_sections,
    torch.ops.aten.where.default,
    torch.ops.aten.nonzero_numpy.default,
}
"""Ops that torch does not tag so."""


def deciding(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The operands of an op whose values decide the shape of its result."""
    name = f"{func.namespace}.{func._opname}"
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if name == "aten.repeat_interleave":
        wanted = [given["repeats"]]
    else:
        wanted = [given[x] for x in _DECIDING[name]] if name in _DECIDING else list(given.values())
    tensors = [x for x in torch.utils._pytree.tree_leaves(wanted) if isinstance(x, Tensor)]
    if name == "aten.index":
        return [x for x in tensors if x.dtype in (torch.bool, torch.uint8)]
    return tensors


def tells_how(tensor: Tensor) -> bool:
    """Whether an input says how to read the others: integers, or a mask of zeros and ones."""
    if tensor.is_meta:
        return False
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    ones = tensor == 1
    return bool(ones.any() and (ones | (tensor == 0)).all())
