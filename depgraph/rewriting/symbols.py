"""Sizes as symbols: what Python computes from them is an expression, what it decides is a guard.

The symbols are torch's own (``torch.fx.experimental.symbolic_shapes``), as ``torch.export`` uses
them. Whatever leaves the world of symbols (``len``, ``range``, ``int``, a branch) leaves a guard,
so that an expression and its guards together are right at every size, or say that they are not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import GuardSource, Source
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from depgraph.tracing.source import is_foreign

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class _Given(Source):
    """Where a symbol is from: only its name matters."""

    text: str

    @property
    def _name_template(self) -> str:
        return self.text

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT


def _whole(function: Callable[[Any], int]) -> Any:
    """A function of Python that a proxy does not pass on, as a node of its graph."""

    def applied(x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, fx.Proxy):
            return function(x)
        return x.tracer.create_proxy("call_function", function, (x,), {})

    return staticmethod(applied)


class _Arithmetic(PythonReferenceAnalysis):
    """Python's own arithmetic, for nodes of a graph as well as for numbers."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    truediv = int_truediv
    floor_to_int = _whole(math.floor)
    ceil_to_int = _whole(math.ceil)
    round_to_int = _whole(round)
    trunc_to_int = _whole(math.trunc)

    @staticmethod
    def round_decimal(a: Any, digits: Any) -> Any:
        return a.tracer.create_proxy("call_function", round, (a, digits), {})


@contextmanager
def _spelled_out() -> Iterator[None]:
    """Let code that writes a symbol into a text, a key of a table say, see its number."""
    plain = {kind: kind.__repr__ for kind in SYMBOLIC}

    def shown(value: Any) -> str:
        asked = is_foreign(sys._getframe(1))
        return repr(pin(value)) if asked else plain[type(value)](value)

    for kind in SYMBOLIC:
        kind.__repr__ = shown  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, was in plain.items():
            kind.__repr__ = was  # type: ignore[method-assign]


class Symbols:
    """The symbols of one trace, what is known of them, and how to write them down."""

    def __init__(self) -> None:
        self._env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self._symbols: list[sympy.Symbol] = []
        self._required: list[Any] = []

    def new(self, size: int) -> torch.SymInt:
        """A symbol that is ``size`` in the example."""
        source = _Given(f"n{len(self._symbols)}")
        symbol = self._env.create_symbol(
            size, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
        )
        if not isinstance(symbol, sympy.Symbol):
            raise TypeError(f"torch made no symbol of the size {size}, but {symbol}")
        self._symbols.append(symbol)
        made = self._env.create_symintnode(symbol, hint=size, source=source)
        if not isinstance(made, torch.SymInt):
            raise TypeError(f"torch made no symbolic size of {symbol}, but {made}")
        return made

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Sizes are taken to be larger than one wherever no code asks."""
        with _config.patch(backed_size_oblivious=True), _spelled_out():  # type: ignore[attr-defined]
            yield

    def require(self, expr: Any) -> None:
        """One more condition under which the trace is right: true in the example."""
        if expr not in (True, sympy.true):
            self._required.append(expr)

    def guards(self) -> list[str]:
        """Conditions on the symbols under which the trace is right, as Python over n0, n1, ..."""
        names = {
            symbol: sympy.Symbol(f"n{i}", integer=True) for i, symbol in enumerate(self._symbols)
        }
        asked = [*(guard.expr for guard in self._env.guards), *self._required]
        printed = (PythonPrinter().doprint(expr.xreplace(names)) for expr in asked)
        return list(dict.fromkeys(printed))

    def written(self, value: Any, graph: fx.Graph, node_of: Callable[[int], fx.Node]) -> Any:
        """An expression as nodes of a graph.

        Parameters
        ----------
        value : SymInt, SymFloat or SymBool
        graph : fx.Graph
        node_of : callable
            Gives the node of a symbol, by its number.

        Returns
        -------
        fx.Node or number
            A number where the guards leave only one.
        """
        expr = self._env.simplify(value.node.expr)
        tracer = GraphAppendingTracer(graph)
        held = {
            symbol: fx.Proxy(node_of(i), tracer)
            for i, symbol in enumerate(self._symbols)
            if symbol in expr.free_symbols
        }
        if not held:
            return hint(value)
        try:
            made = sympy_interp(_Arithmetic, held, expr)
        except (AttributeError, KeyError, NotImplementedError):
            return pin(value)  # a function that Python has no operator for
        return made.node if isinstance(made, fx.Proxy) else made


def hint(value: Any) -> Any:
    """The number that a symbolic one is in the example, without a guard; others as they are."""
    return value.node.hint if isinstance(value, SYMBOLIC) else value


def pin(value: Any) -> Any:
    """The number that a symbolic one is in the example, with a guard that it is; others as is."""
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return bool(value) if isinstance(value, torch.SymBool) else value


def divides(value: torch.SymInt, number: int) -> bool:
    """Whether an expression is a multiple of a number whatever the symbols are."""
    if not number:
        return False
    remainder = value % number
    return bool((remainder.node.expr if isinstance(remainder, SYMBOLIC) else remainder) == 0)
