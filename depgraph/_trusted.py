"""Names of classes and functions in saved models, and which of them a file may ask for."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from depgraph.errors import DepgraphError

TRUSTED = ("torch", "timm", "torchvision", "transformers", "einops", "depgraph")
"""Packages that a structure may import by itself; others must have been imported before."""


def is_trusted(cls: type) -> bool:
    """Whether a class comes from a package that a structure may import by itself."""
    return cls.__module__.partition(".")[0] in TRUSTED


def qualified_name(found: Any, where: str) -> str:
    """``"package.module:Qualified.name"`` of a class or function.

    Parameters
    ----------
    found : type or function
    where : str
        What refers to it, for the message.

    Returns
    -------
    str

    Raises
    ------
    DepgraphError
        When no other program could import it.
    """
    name = f"{found.__module__}:{found.__qualname__}"
    if "<" in name:
        raise DepgraphError(
            f"'{where}' refers to {name}, which no other program can import; define it at the "
            "top level of a module"
        )
    return name


def load_object(name: str) -> Any:
    """The class or function of that name, from a trusted or already imported module.

    Parameters
    ----------
    name : str
        ``"package.module:Qualified.name"``.

    Returns
    -------
    object

    Raises
    ------
    DepgraphError
        When it is in neither, or not there.
    """
    module_name, _, path = name.partition(":")
    if module_name not in sys.modules:
        if module_name.partition(".")[0] not in TRUSTED:
            raise DepgraphError(
                f"the saved model needs '{name}'; import {module_name} before loading it"
            )
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            raise DepgraphError(f"the saved model needs '{name}': {error}") from error
    found: Any = sys.modules[module_name]
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType)):
        raise DepgraphError(f"the saved model needs '{name}', which this version does not have")
    return found
