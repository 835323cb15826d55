"""Tells hooks that only look on from those that are part of a forward.

A hook that gives something back, or writes to the module or to a tensor, decides what is computed:
it runs in a trace. One that records, counts or prints does not: the values that it is after are
nothing that a tensor without data has.
"""

from __future__ import annotations

import dis
import functools
import sysconfig
import types
from typing import Any

from torch import nn

_LIBRARIES = tuple({sysconfig.get_path(key) for key in ("purelib", "platlib", "stdlib")})
_GIVE_NOTHING = frozenset({"append", "appendleft", "extend", "insert", "update", "put", "print"})
"""Calls that give nothing back, of names that no tensor has, for a hook that is one call."""


def without_observers(model: nn.Module) -> nn.Module:
    """A structural copy of a model without the forward hooks that only look on."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if only_looks_on(hook)]:
                del hooks[key]
    return model


def only_looks_on(hook: Any) -> bool:
    """Whether a forward hook of the user's changes nothing that a forward computes with.

    Parameters
    ----------
    hook : callable

    Returns
    -------
    bool
        False also where its code does not show it. Hooks of installed libraries are taken to be
        part of their models.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, types.BuiltinFunctionType):
        return hook.__name__ in _GIVE_NOTHING
    if not isinstance(hook, (types.FunctionType, types.MethodType)):
        hook = types.MethodType(type(hook).__call__, hook)
    code = getattr(hook, "__code__", None)
    if code is None or code.co_filename.startswith(_LIBRARIES):
        return False
    owner = getattr(hook, "__self__", None)
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    keeps_own = owner is not None and not isinstance(owner, nn.Module)
    return not any(_acts(steps, i, keeps_own) for i in range(len(steps)))


_NO_STEPS = ("RESUME", "PRECALL", "CACHE", "NOP", "EXTENDED_ARG", "KW_NAMES")


def _acts(steps: list[dis.Instruction], i: int, keeps_own: bool) -> bool:
    """Whether a step of a hook's code gives something back, or may write to what it was given."""
    step, before = steps[i], steps[max(i - 2, 0) : i]
    name, value = step.opname, str(step.argval)
    if name == "RETURN_CONST":
        return step.argval is not None
    if name == "RETURN_VALUE":
        if step.is_jump_target:  # one of several values
            return True
        if before[-1].opname.startswith("CALL"):
            return not any(x.argval in _GIVE_NOTHING for x in steps if x.opname.startswith("LOAD"))
        return before[-1].opname != "LOAD_CONST" or before[-1].argval is not None
    if name in ("STORE_ATTR", "DELETE_ATTR"):
        return not keeps_own
    if name.startswith(("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")):
        local = [x.opname.startswith("LOAD_FAST") for x in before[:1]]
        known = [x.opname.startswith("LOAD_") for x in before]
        return any(local) or not all(known)
    if name == "BINARY_OP" and step.argrepr.endswith("="):
        return steps[i + 1].opname.startswith("STORE_FAST")
    in_place = value.endswith("_") and not value.endswith("__")
    return name.startswith("LOAD_") and (value in ("setattr", "delattr") or in_place)
