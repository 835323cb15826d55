"""Which entries of which weights to multiply for one value to come out multiplied, and no other.

The search walks back from the value through ops that are homogeneous of degree one; the proof then
walks forward from the weights it has found: every value that holds something of theirs must reach
the one read that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush

import torch
from torch import fx

from depgraph.coupling.propagate import arguments, op_name
from depgraph.rescaling.masks import (
    LAYERS,
    PASSING,
    PRODUCTS,
    Mask,
    State,
    Unproven,
    compact,
    either,
    holds_any,
    is_sum,
    pulled,
    pushed,
    times,
)
from depgraph.tracing.trace import Trace, shape


class Weights:
    """Finds the weights behind values of one trace.

    Attributes
    ----------
    reached : int
        The last place in the trace that what was found leads to.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._names = {node: name for name, node in trace.tensors.items()}
        self._walks: list[_Walk] = []
        self.reached = 0

    def behind(self, reads: Mapping[fx.Node, fx.Node]) -> dict[str, Mask] | None:
        """Entries of parameters that, multiplied by a number, multiply just what is read.

        Parameters
        ----------
        reads : mapping of fx.Node to fx.Node
            Calls, and the operand of each that is to be multiplied.

        Returns
        -------
        dict of str to BoolTensor, or None
            By name of the parameter, of its shape. None where there are none, or where they
            multiply something else too.
        """
        for attempt in range(2):  # of two factors either will do: keys, where queries will not
            try:
                found = self._walk(attempt).back(reads)
                last = self._walk(attempt).forth(found, reads)
            except Unproven:
                continue
            self.reached = max(self.reached, last)
            return {self._names[node]: mask for node, mask in found.items()}
        return None

    def suffice(self, masks: Mapping[str, Mask], reads: Mapping[fx.Node, fx.Node]) -> bool:
        """Whether these entries of parameters, multiplied, multiply just what is read."""
        nodes = {self._trace.tensors[name]: mask for name, mask in masks.items()}
        try:
            self._walk(0).forth(nodes, reads)
        except Unproven:
            return False
        return True

    def _walk(self, attempt: int) -> _Walk:
        while attempt >= len(self._walks):
            self._walks.append(_Walk(self._trace, last=bool(len(self._walks))))
        return self._walks[attempt]


class _Walk:
    def __init__(self, trace: Trace, last: bool) -> None:
        self.nodes = trace.nodes
        self.place = {node: i for i, node in enumerate(trace.nodes)}
        self.outputs = set(trace.outputs)
        self.parameters = {
            node
            for name, node in trace.tensors.items()
            if name in trace.parameters and node.meta["val"].is_floating_point()
        }
        self.step = -1 if last else 1
        self._carriers: dict[fx.Node, list[fx.Node]] = {}
        for node in trace.nodes:
            if node.op == "call_function":
                found = self._operands(node)
                if any(x in self.parameters or x in self._carriers for x in found):
                    self._carriers[node] = found

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands to multiply for a result to be multiplied; none where that will not do."""
        name, operands = op_name(node), node.all_input_nodes
        if name in LAYERS:
            a = arguments(node)
            affine = [x for x in (a["weight"], a.get("bias")) if x is not None]
            return affine if a["weight"] else []
        if is_sum(node):
            a = arguments(node)
            return operands if isinstance(a.get("other", node), fx.Node) else []
        if name in PRODUCTS:
            offered = operands[:1] if name == "aten.div" else operands[:: self.step]
            able = (x for x in offered if x in self.parameters or x in self._carriers)
            return [x for x in able if times(node, x) == 1][:1]
        return operands[:1] if name in PASSING else []

    def back(self, reads: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, Mask]:
        """The parameters behind what is read, and what of them is."""
        wanted: dict[fx.Node, State] = {}
        heap: list[int] = []

        def want(node: fx.Node, mask: State) -> None:
            if node not in wanted:
                wanted[node] = mask
                heappush(heap, -self.place[node])
            elif isinstance(mask, list):
                wanted[node] = [either(*pair) for pair in zip(wanted[node], mask, strict=True)]
            else:
                wanted[node] = either(wanted[node], mask)

        for operand in reads.values():
            want(operand, torch.ones((), dtype=torch.bool).expand(shape(operand)))
        found = {}
        while heap:
            node = self.nodes[-heappop(heap)]
            if node in self.parameters:
                found[node] = wanted[node]
                continue
            if node not in self._carriers:
                raise Unproven
            for operand, mask in pulled(node, self._carriers[node], wanted[node]):
                if isinstance(mask, list) or holds_any(mask):
                    want(operand, mask)
        return found

    def forth(self, found: Mapping[fx.Node, Mask], reads: Mapping[fx.Node, fx.Node]) -> int:
        """Follow the parameters to everything that holds something of them; its last place."""
        states: dict[fx.Node, State] = dict(found)
        heap = sorted(self.place[user] for node in found for user in node.users)
        done = set()
        while heap:
            node = self.nodes[heappop(heap)]
            if node in done:
                continue
            done.add(node)
            held = {x: states[x] for x in node.all_input_nodes if x in states}
            if node in reads:
                self._read(node, reads[node], held)
                continue
            state = pushed(node, held)
            if isinstance(state, (list, tuple)) or holds_any(state):
                if node in self.outputs:
                    raise Unproven
                states[node] = state
                for user in node.users:
                    heappush(heap, self.place[user])
        if not done.issuperset(reads):
            raise Unproven
        return max(map(self.place.__getitem__, done))

    def _read(self, node: fx.Node, operand: fx.Node, held: Mapping[fx.Node, State]) -> None:
        whole = operand in held and bool(compact(held[operand]).all())
        if not whole or len(held) > 1 or times(node, operand) > 1:
            raise Unproven
