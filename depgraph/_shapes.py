"""Results of the ops that a transformer is made of, without running torch's slow meta kernels.

Only for operands that fit and lie contiguously in memory; any other use runs the op itself, which
also says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def quick_result(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an op on meta tensors; None when the op has to be run to know it.

    Parameters
    ----------
    func : OpOverload
    args, kwargs : sequence, dict
        As the op is called; tensors on the meta device.

    Returns
    -------
    Tensor or None
        On the meta device.
    """
    known = _KNOWN.get(func)
    if known is None or kwargs:
        return None
    first = args[0]
    if not first.is_contiguous() or not first.is_floating_point():
        return None
    shape = known(*args)
    return None if shape is None else torch.empty(shape, dtype=first.dtype, device="meta")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[int] | None:
    fits = weight.dim() == 2 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return (*x.shape[:-1], weight.shape[0])


def _layer_norm(
    x: Tensor,
    normalized: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
) -> Sequence[int] | None:
    size = tuple(normalized)
    affine = [tensor for tensor in (weight, bias) if tensor is not None]
    fits = tuple(x.shape[x.dim() - len(size) :]) == size
    return x.shape if fits and all(tuple(tensor.shape) == size for tensor in affine) else None


def _batch_norm(x: Tensor, *tensors: Any) -> Sequence[int] | None:
    affine = [tensor for tensor in tensors[:4] if tensor is not None]
    if tensors[4] or x.dim() < 2 or any(tensor.shape != x.shape[1:2] for tensor in affine):
        return None
    return x.shape


def _alike(x: Tensor, y: Any, *_: Any) -> Sequence[int] | None:
    if not isinstance(y, Tensor) or not y.is_contiguous():
        return None
    return x.shape if x.shape == y.shape and x.dtype == y.dtype else None


def _unary(x: Tensor, *_: Any) -> Sequence[int] | None:
    return x.shape


def _attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Sequence[int] | None:
    lead = q.shape[:-2]
    fits = q.dim() > 2 and k.shape[:-2] == lead and v.shape[:-2] == lead
    fits = fits and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
    plain = fits and (not options or options[0] is None)
    return (*q.shape[:-1], v.shape[-1]) if plain else None


_KNOWN: dict[Any, Callable[..., Sequence[int] | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.batch_norm.default: _batch_norm,
    aten.add.Tensor: _alike,
    aten.mul.Tensor: _alike,
    aten.gelu.default: _unary,
    aten.silu.default: _unary,
    aten.relu.default: _unary,
    aten.scaled_dot_product_attention.default: _attention,
}
