"""Results of the ops that most models are made of, without running torch's slow meta kernels.

Only for operands that fit and lie densely in memory; any other use runs the op itself, which also
says what is wrong with it.
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
    if func is aten.cat.default:
        first = first[0] if first else None
        args = (first, *args)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    result = known(*args)
    if result is None or isinstance(result, Tensor):
        return result
    return torch.empty(result, dtype=first.dtype, device="meta")


def grouped_result(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """The result of a matrix product by groups, also of float32, which torch's own kernel refuses.

    Parameters
    ----------
    a, b, offs, bias, out_dtype
        As of ``torch.nn.functional.grouped_mm``.

    Returns
    -------
    Tensor
        On the meta device; rows begin at multiples of 16 bytes, as torch lays them out.

    Raises
    ------
    RuntimeError
        Where torch's kernels refuse the operands.
    """
    each = ROW_BYTES // a.element_size()
    if a.dtype != b.dtype or a.dtype not in GROUPED_DTYPES or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(f"no product by groups of {_said(a)} and {_said(b)}")
    for x in (a, b):
        if 1 not in x.stride()[-2:] or max(x.stride()[-2:]) % each:
            raise RuntimeError(
                f"a product by groups wants rows in multiples of {ROW_BYTES} bytes, not {_said(x)}"
            )
    lead = a.shape[:1] if a.dim() == b.dim() == 3 else offs.shape if a.dim() == b.dim() else ()  # type: ignore[union-attr]
    sizes = [*lead, a.shape[-2], b.shape[-1]]
    row = -(-sizes[-1] // each) * each
    strides = [sizes[-2] * row, row, 1][-len(sizes) :]
    return torch.empty_strided(sizes, strides, dtype=out_dtype or a.dtype, device="meta")


ROW_BYTES = 16
"""Rows of the operands of a product by groups are multiples of this."""
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)} ({x.dtype})"


def quick_write(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an op only writes numbers into its first operand, which stays as it looks."""
    pointwise = torch.Tag.pointwise in func.tags or func in _UNTAGGED
    if kwargs or not pointwise or not func._opname.endswith("_"):
        return False
    target, *others = args
    fits = isinstance(target, Tensor) and target.is_floating_point() and _dense(target)
    return fits and all(_stretches(x, target) for x in others if isinstance(x, Tensor))


_UNTAGGED = (aten.hardswish_.default, aten.relu6_.default)
"""Pointwise ops that torch does not tag as such."""


def _dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each place once."""
    if x.is_contiguous():
        return True
    have = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != have:
            return False
        have *= size
    return True


def _stretches(x: Tensor, to: Tensor) -> bool:
    """Whether one tensor is broadcast to the shape of another of its dtype."""
    ends = zip(reversed(x.shape), reversed(to.shape), strict=False)
    fits = x.dtype == to.dtype and x.dim() <= to.dim()
    return fits and all(size in (1, full) for size, full in ends)


def _like(x: Tensor, *_: Any) -> Tensor | None:
    """The same shape, laid out in memory in the same way."""
    if not _dense(x):
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[int] | None:
    fits = weight.dim() == 2 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    if not (fits and x.is_contiguous()):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
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
    fits = tuple(x.shape[x.dim() - len(size) :]) == size  # the result is contiguous in any case
    return x.shape if fits and all(tuple(tensor.shape) == size for tensor in affine) else None


def _batch_norm(x: Tensor, *tensors: Any) -> Tensor | None:
    affine = [tensor for tensor in tensors[:4] if tensor is not None]
    if x.dim() < 2 or any(tensor.shape != x.shape[1:2] for tensor in affine):
        return None
    if tensors[4] and not x.is_contiguous():  # training
        return None
    return _like(x) if all(tensor.dtype == x.dtype for tensor in affine) else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Sequence[int] | None:
    """Torch's own meta kernel gives a contiguous result, whatever the operands look like."""
    rank = weight.dim() - 2
    fits = x.dim() == rank + 2 and x.dtype == weight.dtype and not isinstance(padding, str)
    fits = fits and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    if not fits or x.numel() == 0 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    sizes = []
    each = (_spread(value, rank) for value in (stride, padding, dilation))
    for size, kernel, step, pad, gap in zip(x.shape[2:], weight.shape[2:], *each, strict=True):
        sizes.append((size + 2 * int(pad) - gap * (kernel - 1) - 1) // step + 1)
    return (x.shape[0], weight.shape[0], *sizes) if min(sizes) > 0 else None


def _spread(value: Any, rank: int) -> Sequence[int]:
    return tuple(value) if len(value) == rank else tuple(value) * rank


def _binary(x: Tensor, y: Any, *_: Any) -> Tensor | None:
    if not isinstance(y, Tensor):
        return _like(x) if type(y) in (int, float) else None
    return _like(x) if _stretches(y, x) else None  # the first operand decides on the layout


def _softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor | None:
    return _like(x) if dtype is None and x.is_contiguous() and -x.dim() <= dim < x.dim() else None


def _cat(first: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Sequence[int] | None:
    rank = first.dim()
    if rank == 0 or not -rank <= dim < rank:
        return None
    dim %= rank
    before, after = first.shape[:dim], first.shape[dim + 1 :]
    for x in tensors:
        by_channel = rank == 4 and x.is_contiguous(memory_format=torch.channels_last)
        fits = x.dim() == rank and x.shape[:dim] == before and x.shape[dim + 1 :] == after
        if not fits or by_channel or not x.is_contiguous() or x.dtype != first.dtype:
            return None
    return (*before, sum(x.shape[dim] for x in tensors), *after)


def _mean(x: Tensor, dims: Any, keep: bool = False) -> Sequence[int] | None:
    if not isinstance(dims, (list, tuple)) or not dims or not x.is_contiguous():
        return None
    if not all(-x.dim() <= dim < x.dim() for dim in dims):
        return None
    gone = {dim % x.dim() for dim in dims}
    if len(gone) < len(dims):
        return None
    if keep:
        return [1 if dim in gone else size for dim, size in enumerate(x.shape)]
    return [size for dim, size in enumerate(x.shape) if dim not in gone]


def _resized(x: Tensor, size: Any, *_: Any) -> Sequence[int] | None:
    """Spatial dimensions of a given size, by resampling or adaptive pooling."""
    fits = isinstance(size, (list, tuple)) and len(size) == x.dim() - 2 > 0
    return (*x.shape[:2], *size) if fits and x.is_contiguous() and min(size) > 0 else None


def _attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Sequence[int] | None:
    lead = q.shape[:-2]
    fits = q.dim() > 2 and k.shape[:-2] == lead and v.shape[:-2] == lead and q.is_contiguous()
    fits = fits and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
    plain = fits and (not options or options[0] is None)
    return (*q.shape[:-1], v.shape[-1]) if plain else None


_POINTWISE = (aten.gelu, aten.silu, aten.relu, aten.sigmoid, aten.tanh, aten.hardswish)
_MORE = (aten.hardsigmoid, aten.hardtanh, aten.relu6, aten.mish, aten.elu, aten.leaky_relu)
_KNOWN: dict[Any, Callable[..., Sequence[int] | Tensor | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.batch_norm.default: _batch_norm,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.div.Tensor: _binary,
    aten.softmax.int: _softmax,
    aten.cat.default: _cat,
    aten.mean.dim: _mean,
    aten.upsample_bicubic2d.vec: _resized,
    aten.upsample_bilinear2d.vec: _resized,
    aten.upsample_nearest2d.vec: _resized,
    aten.adaptive_avg_pool2d.default: _resized,
    **{packet.default: _like for packet in (*_POINTWISE, *_MORE)},
    aten.scaled_dot_product_attention.default: _attention,
}
