"""Lets a recorder see the calls of a model's modules and of lists used as indices, while it runs.

A hook on every module would cost more than most of their ops do; so ``nn.Module.__call__`` hands
the calls of watched modules over, and treats all others, of other threads too, as ever.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from depgraph.tracing.source import is_foreign

Gradients = Callable[[Tensor], tuple[bool, bool] | None]


class Watcher(Protocol):
    """Who is told of calls."""

    def call(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """In place of a module's call."""

    def changed(self) -> None:
        """An attribute of a watched module was set."""

    def mode_read(self, name: str) -> None:
        """Some code asked a watched module whether it is in training."""


_watched: dict[int, tuple[Watcher, str]] = {}
_lock = threading.Lock()
_depth = 0
_plain: dict[str, Any] = {}
"""What is done to calls and attributes of modules when no one watches."""
_plain_index: Any = torch._C.TensorBase.__getitem__
_OLD_NAMES = {
    dtype: torch.empty(0, dtype=dtype).type().rpartition(".")[2]
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.complex64, torch.complex128),
    )
}
_plain_type: Any = torch._C.TensorBase.type
_plain_device: Any = torch._C.TensorBase.device
_plain_requires_grad: Any = torch._C.TensorBase.requires_grad
_plain_is_leaf: Any = torch._C.TensorBase.is_leaf
_here = threading.local()
"""In a thread that records a forward: the device that it thinks it runs on, and who is told when it
asks which tensors need gradients."""


def plain_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a module as if no one watched."""
    return _plain["__call__"](module, *args, **kwargs)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    found = _watched.get(id(module))
    if found is None:
        return plain_call(module, args, kwargs)
    return found[0].call(found[1], module, args, kwargs)


def _set(module: nn.Module, name: str, value: Any) -> None:
    if (found := _watched.get(id(module))) is not None:
        found[0].changed()
    _plain["__setattr__"](module, name, value)


def _mode(module: nn.Module) -> bool:
    if (found := _watched.get(id(module))) is not None:
        found[0].mode_read(found[1])
    try:
        mode: bool = vars(module)["training"]
    except KeyError:
        raise AttributeError("training") from None
    return mode


def _set_mode(module: nn.Module, mode: bool) -> None:
    vars(module)["training"] = mode


def _index(tensor: Tensor, places: Any) -> Any:
    """Makes tensors of lists used as indices, which torch would turn into ones out of sight."""
    each = places if isinstance(places, tuple) else (places,)
    if any(isinstance(place, list) for place in each):
        places = tuple(torch.tensor(x) if isinstance(x, list) else x for x in each)
    return _plain_index(tensor, places)


def _device(tensor: Tensor) -> torch.device:
    """Where code other than torch's thinks that a tensor is: it may do other things elsewhere."""
    device: torch.device = _plain_device.__get__(tensor)
    here: torch.device | None = getattr(_here, "device", None)
    told = device.type == "meta" and here is not None and is_foreign(sys._getframe(1))
    return here if told and here is not None else device


def _type(tensor: Tensor, dtype: Any = None, **options: Any) -> Any:
    """Old names of types, as ``"torch.HalfTensor"``, which say a device too: meta has none."""
    here: torch.device | None = getattr(_here, "device", None)
    if here is None or _plain_device.__get__(tensor).type != "meta":
        return _plain_type(tensor, dtype, **options)
    if dtype is None:
        there = "torch" if here.type == "cpu" else f"torch.{here.type}"
        return f"{there}.{_OLD_NAMES[tensor.dtype]}"
    named = dtype.__name__ if isinstance(dtype, type) else str(dtype).rpartition(".")[2]
    known = (kind for kind, name in _OLD_NAMES.items() if name == named)
    return tensor.to(next(known, dtype))


def _requires_grad(tensor: Tensor) -> bool:
    """What other code than torch's is told: what holds where the forward runs for real."""
    asked = _asked_by(sys._getframe(1))
    known = asked(tensor) if asked is not None else None
    wanted: bool = _plain_requires_grad.__get__(tensor) if known is None else known[0]
    return wanted


def _is_leaf(tensor: Tensor) -> bool:
    """The same, of whether nothing that is trained comes before a tensor."""
    asked = _asked_by(sys._getframe(1))
    known = asked(tensor) if asked is not None else None
    leaf: bool = _plain_is_leaf.__get__(tensor) if known is None else known[1]
    return leaf


def _asked_by(frame: FrameType) -> Gradients | None:
    asked: Gradients | None = getattr(_here, "gradients", None)
    return asked if asked is not None and is_foreign(frame) else None


@contextmanager
def thought_on(device: torch.device, gradients: Gradients) -> Iterator[None]:
    """Let code of this thread take tensors without data for tensors on a device.

    Parameters
    ----------
    device : torch.device
    gradients : callable
        Says whether a tensor needs gradients, and whether it is a leaf; None of one that is its own
        answer.
    """
    before = getattr(_here, "device", None), getattr(_here, "gradients", None)
    _here.device, _here.gradients = device, gradients
    try:
        yield
    finally:
        _here.device, _here.gradients = before


def can_be_watched(module: nn.Module, with_hooks: bool = False) -> bool:
    """Whether the recorder sees what the module's forward is given and gives by its call alone."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    plain = type(module).__call__ is nn.Module.__call__
    return plain and (with_hooks or not any(hooks))


@contextmanager
def ready_to_watch() -> Iterator[None]:
    """To begin and end watching takes longer than a small module's forward: for many of them."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _plain.update((name, getattr(nn.Module, name)) for name in _WATCHING)
            _patch(_WATCHING)
            nn.Module.training = property(_mode, _set_mode)  # type: ignore[assignment]
            Tensor.__getitem__ = _index  # type: ignore[assignment, method-assign]
            Tensor.type = _type  # type: ignore[assignment, method-assign]
            Tensor.device = property(_device)  # type: ignore[assignment]
            asked = property(_requires_grad, _plain_requires_grad.__set__)
            Tensor.requires_grad = asked  # type: ignore[assignment]
            Tensor.is_leaf = property(_is_leaf)  # type: ignore[assignment]
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _patch(_plain)
                del nn.Module.training
                del Tensor.__getitem__
                del Tensor.type
                del Tensor.device
                del Tensor.requires_grad
                del Tensor.is_leaf


@contextmanager
def watched(watcher: Watcher, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Tell the watcher of these modules' calls, by name, and of changes of their attributes."""
    with ready_to_watch():
        _watched.update((id(module), (watcher, name)) for name, module in modules.items())
        try:
            yield
        finally:
            for module in modules.values():
                del _watched[id(module)]


def _patch(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        setattr(nn.Module, name, function)


_WATCHING = {"__call__": _call, "__setattr__": _set}
