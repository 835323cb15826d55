"""Records a forward as its code sees it: sizes may be symbols, and devices stay what they were.

`depgraph._recorder` records numbers, for the algebra; a forward that is written anew is read from
both, node by node.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from depgraph._meta import CPU, META, creates
from depgraph._recorder import READS, SMALL, Recorder
from depgraph._symbols import SYMBOLIC, hint, pin


class RawRecorder(Recorder):
    """A graph in the making whose numbers may be symbols."""

    def __init__(self) -> None:
        super().__init__()
        self._decided_by: dict[fx.Node, list[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS and isinstance(args[0], Tensor) and args[0].is_meta:
            for symbol in self._decided_by.get(self.node(args[0]), ()):
                pin(symbol)  # the program goes on with a number that these decide
        return super().__torch_dispatch__(func, types, args, kwargs)

    def node(self, value: Any) -> Any:
        """The node that made a tensor; any other value as it is, the meta device too."""
        return super().node(value) if isinstance(value, Tensor) else value

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if creates(func):
            kwargs = {**kwargs, "device": META}
        with torch.no_grad():
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if "symbolic" not in str(error):
                    raise
                # a kernel that knows numbers only: right at these sizes, as a guard then says
                return func(*self._map(args, _concrete), **self._map_values(kwargs, _concrete))

    def _compute(self, node: fx.Node) -> None:
        func: Any = node.target
        operands = node.all_input_nodes
        known = all(operand in self.known for operand in operands)
        if func._schema.is_mutable and not known:
            self.known.clear()
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not known or random or prod(map(hint, node.meta["val"].shape)) > SMALL:
            return

        def real(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return self.known[value]
            return CPU if isinstance(value, torch.device) else hint(value)

        args, kwargs = self._map(node.args, real), self._map_values(dict(node.kwargs), real)
        self.known[node] = func(*args, **kwargs)
        numbers = pytree.tree_leaves((node.args, dict(node.kwargs)))
        own = [value for value in numbers if isinstance(value, SYMBOLIC)]
        inherited = (symbol for x in operands for symbol in self._decided_by.get(x, ()))
        self._decided_by[node] = [*own, *inherited]


def _concrete(value: Any) -> Any:
    """A tensor or number at the sizes of the example, which become guards."""
    if not isinstance(value, Tensor):
        return pin(value)
    size, stride = map(pin, value.shape), map(pin, value.stride())
    return torch.empty_strided(tuple(size), tuple(stride), dtype=value.dtype, device=META)
