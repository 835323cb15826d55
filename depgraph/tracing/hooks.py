"""Tells hooks that only look on from those that are part of a forward.

A hook that gives something back, or writes to the module or to a tensor, decides what is computed:
it runs in a trace. One that records, counts or prints does not: the values that it is after are
nothing that a tensor without data has. Where a hook does both, it does not run either, and what it
may change is no dimension to cut.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sysconfig
import types
from typing import Any

from torch import Tensor, nn

from depgraph.errors import DepgraphError
from depgraph.tracing.modules import named_modules

_LIBRARIES = tuple({sysconfig.get_path(key) for key in ("purelib", "platlib", "stdlib")})
_GIVE_NOTHING = frozenset({"append", "appendleft", "extend", "insert", "update", "put", "print"})
"""Calls that give nothing back, of names that no tensor has, for a hook that is one call."""


def check_no_hooks(name: str, tensor: Tensor, lost_by: str) -> None:
    """Refuse a tensor with a gradient hook, which whatever takes its place would not have.

    Raises
    ------
    DepgraphError
    """
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise DepgraphError(
            f"'{name}' has a gradient hook, which {lost_by} would not have; remove the hook first, "
            "and register it again on the new parameter"
        )


def without_outsiders(model: nn.Module) -> dict[str, str]:
    """Take the forward hooks off a structural copy of a model that no trace may run.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to str
        Modules of which such a hook may change something, and whether that is ``"args"`` or
        ``"output"``, or ``"both"``.
    """
    found: dict[str, str] = {}
    for name, module in named_modules(model).items():
        for place, hooks in (
            ("args", module._forward_pre_hooks),
            ("output", module._forward_hooks),
        ):
            for key, hook in list(hooks.items()):
                looks_on = only_looks_on(hook)
                if not looks_on and not acts_outside(hook):
                    continue
                del hooks[key]
                if not looks_on:
                    found[name] = place if found.get(name, place) == place else "both"
    return found


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
    hook = _function(hook)
    if isinstance(hook, types.BuiltinFunctionType):
        return hook.__name__ in _GIVE_NOTHING
    code = getattr(hook, "__code__", None)
    if code is None or code.co_filename.startswith(_LIBRARIES):
        return False
    owner = getattr(hook, "__self__", None)
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    keeps_own = owner is not None and not isinstance(owner, nn.Module)
    return not any(_acts(steps, i, keeps_own) for i in range(len(steps)))


def acts_outside(hook: Any) -> bool:
    """Whether a hook may do what can be told from outside, or look at values.

    Parameters
    ----------
    hook : callable

    Returns
    -------
    bool
        False of one that computes with what it is given, sets attributes of the module, and is seen
        to do no more; of a method of a module, which a copy has for itself; and of a library's.
    """
    hook = _function(hook)
    code, owner = getattr(hook, "__code__", None), getattr(hook, "__self__", None)
    if code is None or code.co_filename.startswith(_LIBRARIES) or isinstance(owner, nn.Module):
        return False
    known = inspect.getclosurevars(getattr(hook, "__func__", hook))
    reached = {**known.builtins, **known.globals, **known.nonlocals}
    if not all(map(_is_harmless, reached.values())) or known.unbound & _TELLING:
        return True
    return owner is not None or any(
        step.opname in ("STORE_GLOBAL", "STORE_DEREF", "MAKE_FUNCTION", "IMPORT_NAME")
        for step in dis.get_instructions(code)
    )


def _is_harmless(value: Any) -> bool:
    """Whether a hook that reaches a value can do nothing with it but compute."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in ("torch", "math")
    if callable(value) and not isinstance(value, nn.Module):
        home = str(getattr(value, "__module__", ""))
        return value in _COMPUTING or home.partition(".")[0] in ("torch", "math")
    return value is None or isinstance(value, (Tensor, nn.Module, int, float, str))


_COMPUTING = (
    len,
    range,
    isinstance,
    type,
    tuple,
    int,
    float,
    bool,
    min,
    max,
    abs,
    zip,
    sum,
    setattr,
)
_TELLING = frozenset({"item", "tolist", "numpy", "is_meta", "cpu", "data_ptr"})
"""Names of what tells apart, or needs, a tensor with data."""


def _function(hook: Any) -> Any:
    """The function that a hook is made of."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, (types.BuiltinFunctionType, types.FunctionType, types.MethodType)):
        return hook
    return types.MethodType(type(hook).__call__, hook)


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
