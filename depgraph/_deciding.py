"""Tells whether a forward decides anything by sizes, so that another size may run other ops.

While a forward is watched, sizes of tensors are integers that note what is asked of them. A check
that raises is no decision, nor is what torch's own code asks.
"""

from __future__ import annotations

import dis
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

_OWN = ("torch", "depgraph")
"""Packages whose questions decide nothing that a model would."""

_lock = threading.RLock()


@dataclass
class Decisions:
    """What forwards have decided by sizes.

    Attributes
    ----------
    made : bool
        Whether anything.
    compared : set of (int, int)
        Sizes and the numbers that they were compared with.
    """

    made: bool = False
    compared: set[tuple[int, int]] = field(default_factory=set)


_found: list[Decisions] = []


class _Size(int):
    """A size, or what is computed from sizes, that notes when something is decided by it."""

    def __int__(self) -> int:
        return _decided(int.__int__(self))

    def __float__(self) -> float:
        return _decided(int.__float__(self))

    def __bool__(self) -> bool:
        return _decided(int.__bool__(self))


def _computing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def computed(self: int, *others: Any) -> Any:
        result = plain(self, *others)
        return _Size(result) if type(result) is int else result

    return computed


def _telling(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def told(self: int, *others: Any) -> Any:
        return _decided(plain(self, *others))

    return told


def _comparing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def compared(self: int, other: Any) -> Any:
        return _decided(plain(self, other), (self, other))

    return compared


for _name in (
    *("add", "sub", "mul", "floordiv", "mod", "radd", "rsub", "rmul", "rfloordiv", "rmod"),
    *("neg", "pos", "abs"),
):
    setattr(_Size, f"__{_name}__", _computing(f"__{_name}__"))
for _name in (
    *("truediv", "rtruediv", "pow", "rpow", "divmod"),
    *("hash", "str", "repr", "format", "round", "trunc", "floor", "ceil"),
    *("and", "or", "xor", "lshift", "rshift", "rand", "ror", "rxor", "rlshift", "rrshift"),
    *("invert", "rdivmod"),
):
    setattr(_Size, f"__{_name}__", _telling(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Size, f"__{_name}__", _comparing(f"__{_name}__"))
setattr(_Size, "bit_length", _telling("bit_length"))  # noqa: B010


def _decided(answer: Any, compared: tuple[int, Any] | None = None) -> Any:
    frame = sys._getframe(2)
    told = compared is not None and isinstance(compared[1], int)
    if _found and (told or not _found[-1].made) and not _is_own(frame) and not _is_check(frame):
        _found[-1].made = True
        if compared is not None and told:
            _found[-1].compared.add((int.__int__(compared[0]), int.__int__(compared[1])))
    return answer


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _OWN


def _is_check(frame: FrameType) -> bool:
    """Whether what is asked at a place in the code only decides whether an error is raised."""
    if "_assert(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        return True
    return frame.f_lasti in _checks(frame.f_code)


_known: dict[CodeType, frozenset[int]] = {}


def _checks(code: CodeType) -> frozenset[int]:
    """Offsets of comparisons after which one way leads straight to an error."""
    if code not in _known:
        steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
        at = {step.offset: i for i, step in enumerate(steps)}
        found = set()
        for i, step in enumerate(steps[:-1]):
            jump = steps[i + 1]
            if step.opname != "COMPARE_OP" or not jump.opname.startswith("POP_JUMP"):
                continue
            ways = (i + 2, at.get(jump.argval, i + 2))
            if any(_raises(steps, way) for way in ways):
                found.add(step.offset)
        _known[code] = frozenset(found)
    return _known[code]


def _raises(steps: list[dis.Instruction], start: int) -> bool:
    for step in steps[start:]:
        if step.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in step.opname or "RETURN" in step.opname or step.opname == "FOR_ITER":
            return False
    return False


@contextmanager
def decisions_noted() -> Iterator[Decisions]:
    """Watch forwards; what they decide by sizes is noted in what this gives."""
    size, numel, length = torch._C.TensorBase.size, torch._C.TensorBase.numel, Tensor.__len__
    base: Any = torch._C.TensorBase
    shape, nbytes = vars(base)["shape"], vars(base)["nbytes"]
    nelement, stride, contiguous = base.nelement, base.stride, base.is_contiguous

    def noting(found: Any) -> Any:
        frame = sys._getframe(2)
        if _is_own(frame):
            return found
        if "range" in frame.f_code.co_names:  # which takes a number without asking
            _found[-1].made = True
        return _Size(found) if type(found) is int else torch.Size(map(_Size, found))

    def picking(getitem: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, at: getitem(self, _decided(at) if type(at) is _Size else at)

    patches = {
        "shape": property(lambda self: noting(shape.__get__(self))),
        "size": lambda self, *args, **kwargs: noting(size(self, *args, **kwargs)),
        "numel": lambda self: noting(numel(self)),
        "nelement": lambda self: noting(nelement(self)),
        "nbytes": property(lambda self: noting(nbytes.__get__(self))),
        "stride": lambda self, *args, **kwargs: _decided(stride(self, *args, **kwargs)),
        "is_contiguous": lambda self, *args, **kwargs: _decided(contiguous(self, *args, **kwargs)),
        "__len__": lambda self: _decided(length(self)),
    }
    places: dict[tuple[type, str], Any] = {(Tensor, name): patch for name, patch in patches.items()}
    for layers in (nn.ModuleList, nn.Sequential):
        places[layers, "__getitem__"] = picking(vars(layers)["__getitem__"])
    with _lock:
        held = {place: vars(place[0]).get(place[1]) for place in places}
        _found.append(Decisions())
        for (owner, name), patch in places.items():
            setattr(owner, name, patch)
        try:
            yield _found[-1]
        finally:
            for (owner, name), was in held.items():
                if was is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, was)
            _found.pop()
