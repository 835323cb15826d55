"""What each op of a trace has to do, as kinds and sizes: for a model of time measured elsewhere.

No time is in here. An op whose kind is not known is counted by the elements it reads and writes, so
that nothing costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from depgraph.coupling.attention import attention_products
from depgraph.coupling.axes import Atom, Axis, axis_atoms, axis_size, same
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.convolve import group_axis, is_transposed
from depgraph.coupling.rules.pointwise import drops_nothing
from depgraph.tracing.trace import shape

Job = tuple[str, str, tuple[int, ...]]
"""Kind of op, what of its arguments is no size (JSON), and its sizes."""


@dataclass(frozen=True, eq=False)
class Work:
    """What one op has to do.

    Attributes
    ----------
    kind : str
        ``"linear"`` (rows, in, out), ``"matmul"`` (batch, rows, inner, columns), ``"attention"``
        (batch, heads, queries, keys, query dims, value dims unless alike), ``"conv"`` (batch,
        groups, in and out per group, extents), ``"rows"`` and ``"gather"`` (rows, width),
        ``"copy"`` (elements of the largest value), ``"call"`` and ``"module"`` ().
    fixed : str
        JSON of the arguments that are no sizes.
    axes : tuple of Axis
        Whose sizes are the sizes of the job.
    folded_by : frozenset of Atom
        Once one of these has lost units, the op is computed once and kept: it reads parameters
        only, in a forward that is rewritten then (`depgraph.rewriting.rewrite`).
    """

    kind: str
    fixed: str
    axes: tuple[Axis, ...]
    folded_by: frozenset[Atom] = frozenset()

    def is_folded(self, sizes: Mapping[Atom, int]) -> bool:
        """Whether the op costs nothing when atoms have these sizes."""
        return any(sizes.get(atom, atom.size) < atom.size for atom in self.folded_by)

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        """Everything whose size matters."""
        return frozenset(atom for axis in self.axes for atom in axis_atoms(axis))

    @cached_property
    def varies(self) -> tuple[bool, ...]:
        """Which of the sizes pruning can change."""
        return tuple(any(not a.frozen for a in axis_atoms(axis)) for axis in self.axes)

    def job(self, sizes: Mapping[Atom, int]) -> Job:
        """The job when atoms have these sizes."""
        return self.kind, self.fixed, tuple(axis_size(axis, sizes) for axis in self.axes)


def batch_atoms(p: Propagation) -> tuple[Atom, ...]:
    """What the size of the batch is the size of; none where it cannot be told from other sizes."""
    inputs = p.trace.inputs
    leading = p.axes(inputs[0])[0] if inputs and p.trace.batch > 1 else ()
    return tuple(factor for factor in leading if isinstance(factor, Atom))


def work_of(p: Propagation) -> list[Work]:
    """The work of every op and module call of a trace.

    Parameters
    ----------
    p : Propagation
        After its run.

    Returns
    -------
    list of Work
        In the order of the trace; an op that only looks at memory differently is a ``"call"``.
    """
    folded_by = _folded_by(p)
    ops = [
        replace(_of_op(p, node), folded_by=folded_by.get(node, frozenset()))
        for node in p.trace.nodes
        if node.op == "call_function"
    ]
    return ops + [Work("module", "", ()) for _ in p.trace.calls]


def _folded_by(p: Propagation) -> dict[fx.Node, frozenset[Atom]]:
    """What makes the forward a generated one, for each op that reads parameters and buffers only.

    A module whose attention loses query dims gets one.
    """
    owner = p.trace.owner
    cut: dict[str, frozenset[Atom]] = {}
    for product in attention_products(p):
        name = owner.get(product.node, "")
        cut[name] = cut.get(name, frozenset()) | frozenset(axis_atoms(product.query_dim))
    held = set(p.trace.tensors.values())
    found: dict[fx.Node, frozenset[Atom]] = {}
    for node in p.trace.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(x in held for x in inputs):
            held.add(node)
            found[node] = cut.get(owner.get(node, ""), frozenset())
    return found


def _of_op(p: Propagation, node: fx.Node) -> Work:
    name = op_name(node)
    if _is_view(node) or drops_nothing(node):
        return Work("call", "", ())
    make = _KINDS.get(name)
    work = make(p, node) if make else _by_rows(p, node)
    return work or Work("copy", "", (_elements(p, node),))


def _rows(axes: list[Axis]) -> Axis:
    return tuple(factor for axis in axes for factor in axis)


def _linear(p: Propagation, node: fx.Node) -> Work:
    *rows, out = p.axes(node)
    return Work("linear", "", (_rows(rows), p.axes(arguments(node)["weight"])[1], out))


def _addmm(p: Propagation, node: fx.Node) -> Work:
    rows, out = p.axes(node)
    return Work("linear", "", (rows, p.axes(arguments(node)["mat1"])[-1], out))


def _matmul(p: Propagation, node: fx.Node) -> Work | None:
    first = arguments(node)["batch1"] if op_name(node) == "aten.baddbmm" else node.args[0]
    made, inner = p.axes(node), p.axes(first)[-1:]
    if len(made) < 2 or not inner:
        return None
    return Work("matmul", "", (_rows(made[:-2]), made[-2], inner[0], made[-1]))


def _attention(p: Propagation, node: fx.Node) -> Work | None:
    a = arguments(node)
    q, k, v = (p.axes(a[name]) for name in ("query", "key", "value"))
    if len(q) < 3:
        return None
    alike = same(q[-1], v[-1])  # one size then, which is measured as one
    fixed = json.dumps(
        {"masked": a["attn_mask"] is not None, "causal": bool(a["is_causal"]), "alike": alike}
    )
    dims = (q[-1],) if alike else (q[-1], v[-1])
    return Work("attention", fixed, (_rows(q[:-3]), q[-3], q[-2], k[-2], *dims))


def _convolution(p: Propagation, node: fx.Node) -> Work | None:
    a = arguments(node)
    rank = len(shape(a["weight"])) - 2
    x = p.axes(a["input"])
    if is_transposed(node) or len(x) != rank + 2 or isinstance(a.get("padding"), str):
        return None
    groups = group_axis(p, node)
    out, inner, *kernel = p.axes(a["weight"])
    led = len(out) >= len(groups) and all(f is g for f, g in zip(out, groups, strict=False))
    if axis_size(groups) != a["groups"] or not led:
        return None
    names = ("stride", "padding", "dilation")
    fixed = {"kernel": [axis_size(axis) for axis in kernel], **{n: list(a[n]) for n in names}}
    return Work("conv", json.dumps(fixed), (x[0], groups, inner, out[len(groups) :], *x[2:]))


def _gather(p: Propagation, node: fx.Node) -> Work:
    made = p.axes(node)
    return Work("gather", "", (_rows(made[:-1]), made[-1] if made else ()))


_KINDS = {
    "aten.index": _gather,
    "aten.embedding": _gather,
    "aten.index_select": _gather,
    "aten.linear": _linear,
    "aten.addmm": _addmm,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.bmm": _matmul,
    "aten.baddbmm": _matmul,
    "aten.scaled_dot_product_attention": _attention,
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.convolution": _convolution,
}

_ALONG_ROWS = ("aten.layer_norm", "aten.rms_norm", "aten.softmax", "aten._softmax")
"""Ops over the last dimension that are no pointwise ones."""


def _by_rows(p: Propagation, node: fx.Node) -> Work | None:
    """A pointwise op, or one along the last dimension, with what it was called with."""
    name, made = op_name(node), p.axes(node)
    tags = getattr(node.target, "tags", ())
    if not made or not (name in _ALONG_ROWS or torch.Tag.pointwise in tags):
        return None
    if any(not value.meta["val"].is_floating_point() for value in (node, *node.all_input_nodes)):
        return None
    rank = len(made)
    if "softmax" in name and arguments(node)["dim"] not in (-1, rank - 1):
        return None
    args = [_placeholder(x, node) for x in node.args]
    kwargs = {key: _placeholder(x, node) for key, x in node.kwargs.items()}
    if "_norm" in name:
        if len(arguments(node)["normalized_shape"]) != 1:
            return None
        args[1] = ["width"]
    if "softmax" in name:
        args[1] = -1
    try:
        fixed = json.dumps({"op": str(node.target), "args": args, "kwargs": kwargs})
    except TypeError:
        return None  # an argument that is no plain value: counted by elements
    return Work("rows", fixed, (_rows(made[:-1]), made[-1]))


def _placeholder(value: Any, node: fx.Node) -> Any:
    """How an operand lies: as large as the result, one number a column, or one number."""
    if not isinstance(value, fx.Node):
        return value
    here, out = shape(value), shape(node)
    if 2 * prod(here) > prod(out):
        return "all"
    return "column" if here[-1:] == out[-1:] else "one"


def _is_view(node: fx.Node) -> bool:
    """Whether an op moves no numbers."""
    name, value = op_name(node), node.meta.get("val")
    source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else 0
    if name in ("aten.reshape", "aten.flatten", "aten.contiguous") and isinstance(source, Tensor):
        if name == "aten.contiguous":
            return source.is_contiguous()
        try:
            source.view(value.shape)  # type: ignore[union-attr]
        except RuntimeError:
            return False
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # getitem and the like
    returns = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _elements(p: Propagation, node: fx.Node) -> Axis:
    """As many elements as the largest value that an op touches has."""
    values = [p.axes(value) for value in (node, *node.all_input_nodes)]
    values += p.results(node)
    return max((_rows(axes) for axes in values), key=axis_size, default=())
