"""Which exceptions become a sentence, and which sentence."""

from __future__ import annotations

import os

from depgraph.errors import DepgraphError

FAILURES = (
    OSError,
    RuntimeError,
    MemoryError,
    ValueError,  # DepgraphError among them
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)
"""Our own errors, and what torch and timm raise for bad input."""


def sentence(error: BaseException) -> str:
    """What went wrong, in one sentence; a terminal obeys nothing in it, whoever named things."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in _sentence(error))


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted; what was finished is kept: sweep goes on there, the others with --resume"
        )
    if isinstance(error, DepgraphError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"'{os.fspath(error.filename)}': " if error.filename else ""
        return f"{where}{error.strerror}"
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{type(error).__name__}: {text} (--debug shows where)"
