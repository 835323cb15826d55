"""Tensors without data: how they stand in for real ones, and what an op makes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from depgraph.tracing.shapes import grouped_result, quick_result

META = torch.device("meta")
CPU = torch.device("cpu")


def meta_result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an op makes of meta tensors."""
    if func is torch.ops.aten._grouped_mm.default:
        return grouped_result(*args, **kwargs)
    quick = quick_result(func, args, kwargs)
    if quick is not None:
        return quick
    with torch._C._DisablePythonDispatcher():  # C++ meta kernels, where there are some, are faster
        return func(*args, **kwargs)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor without data that looks the same."""
    value = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META, requires_grad=False
    )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def off_meta(value: Any) -> Any:
    """The CPU for the meta device; any other value as it is."""
    return CPU if value == META and isinstance(value, torch.device) else value


def to_meta(value: Any) -> Any:
    """Tensors and devices moved to the meta device; any other value as it is."""
    if isinstance(value, Tensor) and not value.is_meta:
        return on_meta(value)
    return META if isinstance(value, torch.device) else value


_MODES = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.Python
)


@contextmanager
def unseen() -> Iterator[None]:
    """Run past whatever watches torch's calls and ops."""
    with (
        torch._C.DisableTorchFunction(),
        torch._C._ExcludeDispatchKeyGuard(_MODES),
        torch._C._DisablePythonDispatcher(),
    ):
        yield


_here = threading.local()


@contextmanager
def results_kept() -> Iterator[None]:
    """Forwards that are recorded inside share what they know of results."""
    before = getattr(_here, "results", None)
    _here.results = {} if before is None else before
    try:
        yield
    finally:
        _here.results = before


def known_results() -> dict[Any, Any]:
    """Results by op and by what it can see of its arguments, for a recorder to look up and add."""
    kept: dict[Any, Any] | None = getattr(_here, "results", None)
    return {} if kept is None else kept


def copied_unseen(tensor: Tensor) -> Tensor:
    """Another tensor that looks like one, made past whatever watches torch's calls and ops."""
    with unseen():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def copied(result: Any) -> Any:
    """Other tensors that look like those of a result."""
    if isinstance(result, Tensor):
        return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=META)
    return (
        type(result)(copied(item) for item in result)
        if isinstance(result, (tuple, list))
        else result
    )


def look(value: Any) -> Any:
    """What an op can see of its arguments on meta, hashable."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(map(look, value))
    return (type(value), value)


def is_traced(value: Any) -> bool:
    """Whether a tensor of the trace is among the arguments."""
    if isinstance(value, (tuple, list)):
        return any(map(is_traced, value))
    if isinstance(value, dict):
        return any(map(is_traced, value.values()))
    return isinstance(value, Tensor) and value.is_meta


_creation: dict[Any, bool] = {}


def creates(func: Any) -> bool:
    """Whether an op takes no tensor and says where its result shall be."""
    if func not in _creation:
        arguments = func._schema.arguments
        _creation[func] = any(a.name == "device" for a in arguments) and not any(
            "Tensor" in str(a.type) for a in arguments
        )
    return _creation[func]


def made_on_meta(make: Callable[[], Any]) -> Any:
    """What a constructor makes on the meta device; where it looks at numbers, they have values."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError) as error:
        if "meta tensor" not in str(error):
            raise
    with torch.device("meta"), _ShortRangesReal():
        return make()


class _ShortRangesReal(TorchFunctionMode):
    """Makes short ranges with values: some constructors compute the widths of stages with them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _RANGES and made.is_meta and made.numel() <= _SHORT:
            return func(*args, **{**(kwargs or {}), "device": "cpu"})
        return made


_RANGES = (torch.arange, torch.linspace, torch.tensor)
_SHORT = 1 << 10
