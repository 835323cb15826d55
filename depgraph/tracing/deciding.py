"""Tells whether a forward decides anything by sizes, so that another size may run other ops.

While a forward is watched, sizes of tensors are integers that note what is asked of them, and how
they were computed: so it is known at which size the answer would be another one. A check that
raises is no decision, nor is what torch's own code asks. Where a size may decide without being
asked (as the place in a list, or in how many parts a tensor comes apart), the code alone tells.
"""

from __future__ import annotations

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

from depgraph.tracing.bytecode import checks_in, comes_apart, may_hide, numbers_near

_OWN = ("torch", "depgraph")
"""Packages whose questions decide nothing that a model would."""

_lock = threading.RLock()


_FARTHEST = 256
"""Sizes below this one are searched for another answer, and the numbers that code names."""


@dataclass
class Decisions:
    """What forwards have decided by sizes.

    Attributes
    ----------
    made : bool
        Whether anything.
    turning : set of (int, int, int)
        Sizes, and the smallest and largest in their place of ranges with another answer.
    numbers : set of int
        Numbers, and their neighbours, in code that decides by sizes no one knows how.
    asked : set
        Keys of questions, each of which is looked into once.
    """

    made: bool = False
    turning: set[tuple[int, int, int]] = field(default_factory=set)
    asked: set[Any] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)

    def unknown(self, code: CodeType) -> None:
        """Some code decides by a size, no one knows how."""
        self.made = True
        self.numbers.update(numbers_near(code))


_found: list[Decisions] = []


class _Size(int):
    """A size, or what is computed from sizes, that notes when something is decided by it.

    ``how`` is what it was computed by and from; None for a size of a tensor.
    """

    how: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def __int__(self) -> int:
        return _decided(int.__int__(self), (int.__int__, self), known=False)

    def __float__(self) -> float:
        return _decided(int.__float__(self), (int.__float__, self), known=False)

    def __bool__(self) -> bool:
        return _decided(int.__bool__(self), (int.__bool__, self))


_PLAIN = (float, complex, list, tuple, str)


def _computing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def computed(self: int, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is int:
            result = _Size(result)
            result.how = plain, (self, *others)
        elif type(result) is float or (result is NotImplemented and isinstance(others[0], _PLAIN)):
            _decided(None)  # a fraction, which tells nothing, or so many times
        return result

    return computed


def _telling(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def told(self: int, *others: Any) -> Any:
        return _decided(plain(self, *others), (plain, self, *others), known=False)

    return told


def _comparing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def compared(self: int, other: Any) -> Any:
        return _decided(plain(self, other), (plain, self, other))

    return compared


for _name in (
    *("add", "sub", "mul", "floordiv", "mod", "radd", "rsub", "rmul", "rfloordiv", "rmod"),
    *("neg", "pos", "abs", "invert", "trunc", "floor", "ceil", "round", "pow", "rpow"),
    *("and", "or", "xor", "lshift", "rshift", "rand", "ror", "rxor", "rlshift", "rrshift"),
):
    setattr(_Size, f"__{_name}__", _computing(f"__{_name}__"))
for _name in (*("truediv", "rtruediv", "divmod", "rdivmod", "hash", "str", "repr", "format"),):
    setattr(_Size, f"__{_name}__", _telling(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Size, f"__{_name}__", _comparing(f"__{_name}__"))
setattr(_Size, "bit_length", _telling("bit_length"))  # noqa: B010


def _decided(answer: Any, asked: tuple[Any, ...] = (), known: bool = True) -> Any:
    """Note a decision by an answer, and what was asked; whether that alone decides is known."""
    frame = sys._getframe(2)
    if _found and not _is_own(frame) and not _is_check(frame):
        if not (asked and known):
            _found[-1].unknown(frame.f_code)
        if isinstance(answer, int) and asked and all(isinstance(x, int) for x in asked[1:]):
            _found[-1].made = True
            key = tuple(map(_key, asked))
            if key not in _found[-1].asked:
                _found[-1].asked.add(key)
                _found[-1].turning.update(_turning(answer, *asked))
    return answer


def _turning(
    answer: Any, question: Callable[..., Any], *given: int
) -> Iterator[tuple[int, int, int]]:
    """For each size in what is asked, the nearest ranges on both sides with another answer."""
    sizes = set().union(*(_plain_in(x, of_tensors=True) for x in given))
    told = set().union(*(_plain_in(x, of_tensors=False) for x in given))
    near = {number + step for number in told for step in (-1, 0, 1) if number > 0}
    for size in sizes:
        after = sorted(near | {*range(size + 1, _FARTHEST)})
        sides = [n for n in after if n > size], [*range(size - 1, 0, -1)]
        for numbers in sides:
            turned: list[int] = []
            for number in numbers:
                try:
                    other = question(*(_with_size(x, size, number) for x in given))
                except (ArithmeticError, ValueError):
                    other = answer
                if other != answer:
                    turned.append(number)
                elif turned:
                    break
            else:
                turned += [sys.maxsize] * (turned[:1] > [size])  # and all larger ones, it seems
            if turned:
                yield size, min(turned), max(turned)


def _key(value: Any) -> Any:
    """What tells apart how values were computed."""
    if not isinstance(value, _Size):
        return value
    return int.__int__(value), value.how and (value.how[0], *map(_key, value.how[1]))


def _plain_in(value: Any, of_tensors: bool) -> set[int]:
    """The numbers that a value was computed from: sizes of tensors, or those of the code itself."""
    if not isinstance(value, _Size):
        return {value} if type(value) is int and not of_tensors else set()
    if value.how is None:
        return {int.__int__(value)} if of_tensors else set()
    return set().union(*(_plain_in(x, of_tensors) for x in value.how[1]))


def _with_size(value: Any, size: int, number: int) -> Any:
    """What a value would be were each size of this number another one."""
    if not isinstance(value, _Size):
        return value
    if value.how is None:
        plain = int.__int__(value)
        return number if plain == size else plain
    return value.how[0](*(_with_size(x, size, number) for x in value.how[1]))


def note_value_read() -> None:
    """A forward goes on with what a tensor holds that follows from sizes alone."""
    frame: FrameType | None = sys._getframe(1)
    while _found and frame is not None:
        if not _is_own(frame):
            _found[-1].unknown(frame.f_code)
            return
        frame = frame.f_back


def _note_parts(sections: Any = 1) -> None:
    frame = sys._getframe(2)
    if (
        type(sections) is int
        and not _is_own(frame)
        and not comes_apart(frame.f_code, frame.f_lasti)
    ):
        _found[-1].unknown(frame.f_code)


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _OWN


def _is_check(frame: FrameType) -> bool:
    """Whether what is asked at a place in the code only decides whether an error is raised."""
    if "_assert(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        return True
    return frame.f_lasti in checks_in(frame.f_code)


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
        if may_hide(frame.f_code):
            _found[-1].unknown(frame.f_code)
        return _Size(found) if type(found) is int else torch.Size(map(_Size, found))

    def picking(getitem: Callable[..., Any]) -> Callable[..., Any]:
        def pick(layers: Any, at: Any) -> Any:
            if type(at) is _Size:
                _decided(at, (int.__int__, at), known=False)
            return getitem(layers, at)

        return pick

    def parted(plain: Callable[..., Any], first: int) -> Callable[..., Any]:
        def parting(*args: Any, **kwargs: Any) -> Any:
            _note_parts(args[first] if first < len(args) else 1)
            return plain(*args, **kwargs)

        return parting

    patches = {
        "shape": property(lambda self: noting(shape.__get__(self))),
        "size": lambda self, *args, **kwargs: noting(size(self, *args, **kwargs)),
        "numel": lambda self: noting(numel(self)),
        "nelement": lambda self: noting(nelement(self)),
        "nbytes": property(lambda self: noting(nbytes.__get__(self))),
        "stride": lambda self, *args, **kwargs: _decided(stride(self, *args, **kwargs)),
        "is_contiguous": lambda self, *args, **kwargs: _decided(contiguous(self, *args, **kwargs)),
        "__len__": lambda self: _decided(length(self)),
        "__iter__": parted(Tensor.__iter__, 1),
        "unbind": parted(base.unbind, 9),
        "split": parted(Tensor.split, 1),
    }
    places: dict[tuple[Any, str], Any] = {(Tensor, name): patch for name, patch in patches.items()}
    places[torch, "numel"] = lambda x: noting(numel(x))
    places[torch, "unbind"] = parted(torch.unbind, 9)
    places[torch, "split"] = parted(torch.split, 1)
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
