"""Folds what follows or precedes a layer into its weights, in a program of ATen ops.

Every rule looks at ops only. A factor or shift by feature after a linear layer or a convolution
(layer scale, attention scale, batch norm in evaluation) becomes part of its weight and bias,
wherever only moves of the features lie between; the weights of a norm become part of the linear
layers that read it; what depends on weights alone is computed once; layers of which nothing is left
become their bias. The results are the same up to rounding.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depgraph.coupling.propagate import arguments, op_name
from depgraph.coupling.rules.pointwise import drops_nothing
from depgraph.exporting.moves import Sink, shape_hint, sinks

_LAYERS = {"aten.linear": -1, "aten.conv1d": 1, "aten.conv2d": 1, "aten.conv3d": 1}
"""Ops with a weight whose rows make the features of a dimension of the result."""

Affine = tuple[Tensor, Tensor]
"""Factor and shift."""


def fold(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, int]]:
    """A program with everything folded that can be.

    Parameters
    ----------
    module : fx.GraphModule
        From ``torch.export.export(model.eval(), ...).module()``; used up.

    Returns
    -------
    folded : fx.GraphModule
        For inference; with the same inputs and outputs.
    counts : dict of str to int
        How often each rule was applied: ``"constants"``, ``"factors"``, ``"norms"``, ``"empty"``.

    Notes
    -----
    Folding multiplies weights together, in float64, so results differ in the last digits. What
    is looked up in a table of positions is stored as looked up, which may take more memory.
    """
    return _Folder(module).run()


class _Folder:
    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self.tensors: dict[str, Any] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.tensors[node.target] = operator.attrgetter(node.target)(module)
        self.graph.owning_module = None  # its tensors are ours from here on
        self.counts: Counter[str] = Counter()

    @torch.no_grad()
    def run(self) -> tuple[fx.GraphModule, dict[str, int]]:
        self._drop_identities()
        self._compute_constants()
        self._each("aten.linear aten.conv1d aten.conv2d aten.conv3d", self._fold_factors)
        self._each("aten.layer_norm aten.rms_norm", self._fold_norm)
        self._each("aten.linear", self._drop_empty)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        tensors = {name: value for name, value in self.tensors.items() if name in used}
        return fx.GraphModule(tensors, self.graph), dict(self.counts)

    def _each(self, names: str, apply: Callable[[fx.Node], bool]) -> None:
        """Apply a rule to every op of these names, as often as it can be."""
        for node in list(self.graph.nodes):
            while node.op == "call_function" and op_name(node) in names.split() and apply(node):
                pass

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_module":  # checks of the inputs, which the next export makes anew
                self.graph.erase_node(node)
            elif drops_nothing(node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def constant(self, node: Any) -> Tensor | None:
        """The tensor of a node that only names one."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = self.tensors[str(node.target)]
        return value if isinstance(value, Tensor) else None

    def _own(self, node: Any) -> Tensor | None:
        """A constant that nothing else reads, so that it may change without a second copy."""
        value = self.constant(node)
        if value is None:
            return None
        readers = [
            user
            for n in self.graph.find_nodes(op="get_attr", target=node.target)
            for user in n.users
        ]
        return value if len(readers) == 1 else None

    def _trained(self, sources: Sequence[Any]) -> bool:
        """Whether one of these is trained, and so what is made of them."""
        found = map(self.constant, sources)
        return any(tensor.requires_grad for tensor in found if tensor is not None)

    def _put(self, before: fx.Node, name: str, value: Tensor, trained: bool) -> fx.Node:
        """A node for a new tensor, by the name of the one that it replaces, if that is free."""
        while name in self.tensors and self.graph.find_nodes(op="get_attr", target=name):
            name += "_folded"
        trained = trained and value.is_floating_point()
        self.tensors[name] = nn.Parameter(value, requires_grad=trained)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = value.detach()
        return node

    def _set(self, layer: fx.Node, argument: str, value: Tensor) -> None:
        """Give a layer another weight or bias, and forget the one it had."""
        old, weight = arguments(layer)[argument], arguments(layer)["weight"]
        _set_argument(layer, argument, None)
        name = old.target if old is not None else _sibling(weight, argument)
        trained = self._trained([weight if old is None else old])
        if old is not None and not old.users:
            self.graph.erase_node(old)
        _set_argument(layer, argument, self._put(layer, name, value, trained))

    def _compute_constants(self) -> None:
        """Run what depends on no input, once."""
        known: dict[fx.Node, Any] = {}
        for node in list(self.graph.nodes):
            value = self.constant(node)
            if value is not None:
                known[node] = value
            elif self._is_constant(node, known):
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
        for node, value in known.items():
            readers = [user for user in node.users if user not in known]
            if node.op != "get_attr" and readers and isinstance(value, Tensor):
                sources = [n for n in _sources(node) if n.op == "get_attr"]
                name, trained = f"{sources[0].target}_folded", self._trained(sources)
                new = self._put(node, name, value.contiguous(), trained)
                node.replace_all_uses_with(new)
                self.counts["constants"] += 1

    def _is_constant(self, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not all(x in known for x in inputs):
            return False
        if node.target is operator.getitem:
            return True
        tags, schema = getattr(node.target, "tags", ()), getattr(node.target, "_schema", None)
        drawn = torch.Tag.nondeterministic_seeded in tags
        return schema is not None and not schema.is_mutable and not drawn

    def _fold_factors(self, layer: fx.Node) -> bool:
        """A factor and shift by feature after a layer, into its weight and bias."""
        a = arguments(layer)
        weight, bias = self._own(a["weight"]), self.constant(a["bias"])
        if weight is None or (bias is None and a["bias"] is not None):
            return False
        found = sinks(layer, _LAYERS[op_name(layer)])
        for sink in found:
            affine = self._affine(sink)
            others = [s for s in found if s.node is not sink.node]
            if affine is None or _overlap(sink, others) or _repeated(sink):
                continue
            rows = _by_row(affine, sink.labels, len(weight))
            if rows is None:
                continue
            self._scale_rows(layer, weight, bias, *rows)
            sink.node.replace_all_uses_with(sink.source)
            self.graph.erase_node(sink.node)
            self.counts["factors"] += 1
            return True
        return False

    def _scale_rows(
        self, layer: fx.Node, weight: Tensor, bias: Tensor | None, factor: Tensor, shift: Tensor
    ) -> None:
        across = factor.reshape(-1, *[1] * (weight.dim() - 1))
        self._set(layer, "weight", (weight.double() * across).to(weight.dtype))
        if bias is not None or shift.any():
            old = torch.zeros_like(shift) if bias is None else bias.double()
            self._set(layer, "bias", (old * factor + shift).to(weight.dtype))

    def _affine(self, sink: Sink) -> Affine | None:
        """Factor and shift, in the shape of the features, of an op that is nothing else."""
        node = sink.node
        if node.op != "call_function" or shape_hint(node) != tuple(sink.labels.shape):
            return None
        name = op_name(node).rstrip("_")
        if name == "aten.batch_norm":
            return self._batch_norm(node, sink.labels.dim())
        if name not in ("aten.mul", "aten.div", "aten.add") or len(node.args) < 2:
            return None
        first, second = node.args[:2]
        if first is not sink.source and name == "aten.div":
            return None
        other = second if first is sink.source else first
        value = torch.tensor(other) if isinstance(other, (int, float)) else self.constant(other)
        if value is None or node.kwargs.get("rounding_mode") or value.is_complex():
            return None
        value = value.double()
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if name == "aten.add":
            return (one, value) if node.kwargs.get("alpha", 1) == 1 else None
        return (value if name == "aten.mul" else 1 / value, zero)

    def _batch_norm(self, node: fx.Node, rank: int) -> Affine | None:
        a = arguments(node)
        mean, var = (self.constant(a[name]) for name in ("running_mean", "running_var"))
        weight, bias = (self.constant(a[name]) for name in ("weight", "bias"))
        if a["training"] or mean is None or var is None:
            return None
        factor = (var.double() + a["eps"]).rsqrt()
        factor = factor if weight is None else factor * weight.double()
        shift = -mean.double() * factor + (0 if bias is None else bias.double())
        size = (-1, *[1] * (rank - 2))
        return factor.reshape(size), shift.reshape(size)

    def _fold_norm(self, norm: fx.Node) -> bool:
        """The weights of a norm, into the linear layers that read it, if nothing else does."""
        a = arguments(norm)
        weight, bias = self.constant(a["weight"]), self.constant(a.get("bias"))
        if weight is None or weight.dim() != 1 or (bias is None and a.get("bias") is not None):
            return False
        found = sinks(norm, -1)
        columns = [self._columns(sink) for sink in found]
        if not found or any(place is None for place in columns):
            return False
        for sink, place in zip(found, columns, strict=True):
            self._scale_columns(sink.node, weight[place], None if bias is None else bias[place])
        _set_argument(norm, "weight", None)
        if "bias" in a:
            _set_argument(norm, "bias", None)
        self.counts["norms"] += 1
        return True

    def _columns(self, sink: Sink) -> Tensor | None:
        """Which feature each column of a linear layer reads; None for any other op."""
        if sink.node.op != "call_function" or op_name(sink.node) != "aten.linear":
            return None
        a = arguments(sink.node)
        readable = a["bias"] is None or self.constant(a["bias"]) is not None
        if a["input"] is not sink.source or self._own(a["weight"]) is None or not readable:
            return None
        rows = sink.labels.reshape(-1, sink.labels.shape[-1])
        return rows[0] if (rows == rows[0]).all() else None

    def _scale_columns(self, layer: fx.Node, factor: Tensor, shift: Tensor | None) -> None:
        a = arguments(layer)
        weight, bias = self.tensors[a["weight"].target], self.constant(a["bias"])
        if shift is not None:
            new = weight.double() @ shift.double() + (0 if bias is None else bias.double())
            self._set(layer, "bias", new.to(weight.dtype))
        self._set(layer, "weight", (weight.double() * factor.double()).to(weight.dtype))

    def _drop_empty(self, layer: fx.Node) -> bool:
        """A linear layer without inputs gives its bias, where that is added to something."""
        a = arguments(layer)
        if (shape_hint(a["input"]) or (1,))[-1] > 0:
            return False
        done = False
        for user in list(layer.users):
            operands = [x for x in user.all_input_nodes if x is not layer]
            if op_name(user) != "aten.add" or len(operands) != 1 or "alpha" in user.kwargs:
                continue
            if shape_hint(operands[0]) != shape_hint(layer):
                continue
            if a["bias"] is None:
                user.replace_all_uses_with(operands[0])
                self.graph.erase_node(user)
            else:
                user.args = (operands[0], a["bias"])
            self.counts["empty"] += 1
            done = True
        return done


def _sources(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from."""
    found = [node]
    for at in found:
        found.extend(x for x in at.all_input_nodes if x not in found)
    return found


def _sibling(weight: Any, argument: str) -> str:
    """The name of a bias that is not there yet."""
    path, _, last = str(weight.target).rpartition(".")
    return f"{path}.{last.replace('weight', argument) if 'weight' in last else argument}".lstrip(
        "."
    )


def _overlap(sink: Sink, others: list[Sink]) -> bool:
    """Whether a feature that a sink reads is read by another one, too."""
    return any(bool(torch.isin(other.labels, sink.labels).any()) for other in others)


def _repeated(sink: Sink) -> bool:
    """Whether an op reads the features by more than one operand."""
    leaves = pytree.tree_leaves((sink.node.args, sink.node.kwargs))
    return sum(leaf is sink.source for leaf in leaves) != 1


def _by_row(affine: Affine, labels: Tensor, rows: int) -> Affine | None:
    """Factor and shift of each row of the weight; None where they are not one for each row."""
    out = []
    for value, rest in zip(affine, (1.0, 0.0), strict=True):
        try:
            whole = value.cpu().expand(labels.shape)
        except RuntimeError:  # it makes the result larger
            return None
        row = torch.full((rows,), rest, dtype=torch.float64)
        row[labels.flatten()] = whole.flatten()
        if not torch.equal(row[labels], whole):
            return None
        out.append(row.to(value.device))
    return out[0], out[1]


def _set_argument(node: fx.Node, argument: str, value: Any) -> None:
    """Replace one argument of an ATen call."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(argument)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(argument, value)
