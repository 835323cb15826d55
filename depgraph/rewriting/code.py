"""Compiles graphs; torch.fx writes their code, and puts names of arguments and modules in as text.

Such a name may be anybody's: the key of an argument that a plan says the model is called with, or
the key of a ``ModuleDict`` that a configuration names. One that is more than a name is refused.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

from torch import fx

from depgraph.errors import DepgraphError

_QUOTED = frozenset('"\\\n\r{}')
"""What ends the quotes in which torch.fx puts names that are no identifiers."""


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of ``self`` and its placeholders.

    Raises
    ------
    DepgraphError
        When the name of an argument, a module or a tensor cannot be written in code.
    """
    for node in graph.nodes:
        odd = next((key for key in node.kwargs if not _is_identifier(key)), None)
        if odd is None and isinstance(node.target, str):
            parts = node.target.lstrip("*").split(".")
            odd = next((part for part in parts if not _is_safe(part)), None)
        if odd is not None:
            raise DepgraphError(
                f"{str(odd)[:60]!r} is the name of an argument, a module or a tensor, and cannot "
                "be written in the code of a rewritten forward; rename it, or leave it out"
            )
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<depgraph: rewritten forward>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _is_identifier(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_safe(name: str) -> bool:
    """Whether a part of a path is an identifier, or text that ends at the quotes around it."""
    return not (keyword.iskeyword(name) or _QUOTED & set(name))
