"""Results of common ops on tensors whose sizes are symbols, without torch's slow kernels for these.

Sizes are compared as expressions; where equal numbers are not equal as expressions, that they are
is a guard, as torch itself leaves one. What comes back lies densely in memory: a written forward
cannot tell the difference, for its ops run for real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import Mod

from depgraph.rewriting.symbols import hint
from depgraph.tracing.meta import META

aten = torch.ops.aten

Sizes = Sequence[Any]


def quick_symbolic(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], require: Callable[[Any], None]
) -> Tensor | None:
    """The result of an op on meta tensors; None when the op has to be run to know it.

    Parameters
    ----------
    func : OpOverload
    args, kwargs : sequence, dict
        As the op is called; tensors on the meta device, sizes perhaps symbolic.
    require : callable
        Is given expressions that have to hold for the result to be right.

    Returns
    -------
    Tensor or None
        On the meta device.
    """
    known = _KNOWN.get(func)
    if known is None or kwargs or not isinstance(args[0], Tensor):
        return None
    guards: list[Any] = []
    try:
        sizes = known(guards, *args)
    except _Misfit:
        return None
    for guard in guards:
        require(guard)
    if func is aten.copy_.default:
        return args[0]
    return torch.empty(tuple(sizes), dtype=args[0].dtype, device=META)


class _Misfit(Exception):
    """An op has to be run to know what it gives, or what is wrong with it."""


Guards = list[Any]


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _is(a: Any, b: Any) -> bool:
    return a is b or bool(_expr(a) == _expr(b))


def _must_be(guards: Guards, a: Sizes, b: Sizes) -> None:
    """Sizes that an op wants to be the same."""
    if len(a) != len(b):
        raise _Misfit
    for x, y in zip(a, b, strict=True):
        if hint(x) != hint(y):
            raise _Misfit
        if not _is(x, y):
            guards.append(sympy.Eq(_expr(x), _expr(y)))


def _typed(x: Tensor, *others: Tensor | None) -> None:
    """Operands that an op does not convert."""
    if any(other is not None and other.dtype != x.dtype for other in others):
        raise _Misfit


def _broadcast(guards: Guards, a: Sizes, b: Sizes) -> Sizes:
    """The shape of two that are broadcast to each other."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    made = list(longer)
    for i, size in enumerate(shorter, len(longer) - len(shorter)):
        if _is(made[i], 1):
            made[i] = size
        elif not _is(size, 1):
            _must_be(guards, made[i : i + 1], [size])
    return made


def _like(guards: Guards, x: Tensor, *_: Any) -> Sizes:
    return x.shape


def _computed(guards: Guards, x: Tensor, *_: Any) -> Sizes:
    """What is computed of integers need not be one."""
    if not x.is_floating_point():
        raise _Misfit
    return x.shape


def _quotient(guards: Guards, x: Tensor, y: Any) -> Sizes:
    _computed(guards, x)
    return _binary(guards, x, y)


def _binary(guards: Guards, x: Tensor, y: Any, *_: Any) -> Sizes:
    if isinstance(y, Tensor):
        _typed(x, y)
        return _broadcast(guards, x.shape, y.shape)
    if type(y) not in (int, float) or not x.is_floating_point():
        raise _Misfit
    return x.shape


def _onto(guards: Guards, x: Tensor, y: Any, *_: Any) -> Sizes:
    """What is written to a tensor, or covers it, is broadcast to its shape."""
    if not isinstance(y, Tensor) or y.dim() > x.dim():
        raise _Misfit
    _must_be(guards, _broadcast(guards, x.shape, y.shape), x.shape)
    return x.shape


def _matmul(guards: Guards, x: Tensor, y: Tensor) -> Sizes:
    _typed(x, y)
    if min(x.dim(), y.dim()) < 2:
        raise _Misfit
    _must_be(guards, x.shape[-1:], y.shape[-2:-1])
    return (*_broadcast(guards, x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])


def _linear(guards: Guards, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sizes:
    _typed(x, weight, bias)
    if weight.dim() != 2:
        raise _Misfit
    _must_be(guards, x.shape[-1:], weight.shape[1:])
    if bias is not None:
        _must_be(guards, bias.shape, weight.shape[:1])
    return (*x.shape[:-1], weight.shape[0])


def _batch_norm(guards: Guards, x: Tensor, *tensors: Any) -> Sizes:
    _typed(x, *tensors[:4])
    for tensor in tensors[:4]:
        if tensor is not None:
            _must_be(guards, tensor.shape, x.shape[1:2])
    return x.shape


def _layer_norm(guards: Guards, x: Tensor, normalized: Sizes, *tensors: Any) -> Sizes:
    _typed(x, *tensors[:2])
    own = x.shape[x.dim() - len(normalized) :]
    for sizes in (normalized, *(t.shape for t in tensors[:2] if t is not None)):
        _must_be(guards, sizes, own)
    return x.shape


def _softmax(guards: Guards, x: Tensor, dim: int, dtype: Any = None) -> Sizes:
    _computed(guards, x)
    if dtype is not None or not -x.dim() <= dim < x.dim():
        raise _Misfit
    return x.shape


def _attention(guards: Guards, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Sizes:
    if q.dim() < 3:
        raise _Misfit
    _must_be(guards, k.shape[:-2], q.shape[:-2])
    _must_be(guards, v.shape[:-1], k.shape[:-1])
    _must_be(guards, k.shape[-1:], q.shape[-1:])
    return (*q.shape[:-1], v.shape[-1])


def _view(guards: Guards, x: Tensor, sizes: Sizes) -> Sizes:
    """The sizes asked for, which hold as many elements."""
    have, want = list(x.shape), [size for size in sizes if not _is(size, -1)]
    if 0 in map(hint, have) or 0 in map(hint, want) or len(sizes) - len(want) > 1:
        raise _Misfit
    for size in tuple(want):
        match = next((i for i, other in enumerate(have) if _is(size, other)), None)
        if match is not None:
            del have[match]
            del want[next(i for i, other in enumerate(want) if other is size)]
    number, symbols = _parts(have)
    wanted, wanted_symbols = _parts(want)
    common = math.gcd(number, wanted)
    elements = number // common * math.prod(symbols)
    each = wanted // common * math.prod(wanted_symbols)
    if not any(_is(size, -1) for size in sizes):
        if hint(elements) != hint(each):
            raise _Misfit
        if sympy.expand(_expr(elements) - _expr(each)) != 0:
            guards.append(sympy.Eq(_expr(elements), _expr(each)))
        return sizes
    if hint(elements) % hint(each):
        raise _Misfit
    if not _is(each, 1):
        guards.append(sympy.Eq(Mod(_expr(elements), _expr(each)), 0))
    return [elements // each if _is(size, -1) else size for size in sizes]


def _parts(sizes: Sizes) -> tuple[int, list[torch.SymInt]]:
    """The product of the sizes that are numbers, and the symbols."""
    numbers = [size for size in sizes if isinstance(size, int)]
    return math.prod(numbers), [size for size in sizes if not isinstance(size, int)]


_FIRST = (aten.gelu, aten.silu, aten.relu, aten.sigmoid, aten.tanh, aten.dropout)
_KNOWN: dict[Any, Callable[..., Sizes]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.layer_norm.default: _layer_norm,
    aten.batch_norm.default: _batch_norm,
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.div.Tensor: _quotient,
    aten.softmax.int: _softmax,
    aten.scaled_dot_product_attention.default: _attention,
    aten.masked_fill.Scalar: _onto,
    aten.copy_.default: _onto,
    aten.reshape.default: _view,
    aten.view.default: _view,
    aten.contiguous.default: _like,
    aten.clone.default: _like,
    aten.roll.default: _like,
    **{packet.default: _computed for packet in _FIRST},
}
