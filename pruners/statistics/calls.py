"""Watches the layers of a running model: every linear map and convolution, by its parameter.

Layers are known by the weight they are called with, not by a module class, so that a functional
call with a parameter is seen like a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ATEN = torch.ops.aten  # what a forward that the slicer generated calls
_LINEAR = (F.linear, _ATEN.linear.default)
_CONV = (
    *(F.conv1d, F.conv2d, F.conv3d),
    *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default),
)


@dataclass(frozen=True)
class Call:
    """One application of a layer.

    Attributes
    ----------
    weight : str
        Name of the weight parameter.
    inputs, parameter : Tensor
        What the layer is applied to, and its weight.
    bias : Tensor or None
        As it is passed: a parameter, or something computed.
    convolution : dict or None
        Stride, padding, dilation and groups; None for a linear map.
    """

    weight: str
    inputs: Tensor
    parameter: Tensor
    bias: Tensor | None
    convolution: dict[str, Any] | None

    @property
    def rows(self) -> Tensor:
        """What the weight, flattened to (out, in), is multiplied with: (samples, places, in)."""
        x = self.inputs
        if self.convolution is None:
            x = x if x.dim() > 1 else x.unsqueeze(0)
            return x.reshape(len(x), -1, x.shape[-1])
        if x.dim() == 3:  # a convolution over one dimension, as one over two
            x = x.unsqueeze(-1)
        size = (*self.parameter.shape[2:], 1)[:2]
        options = {key: self._pair(key) for key in ("dilation", "padding", "stride")}
        return F.unfold(x, size, **options).transpose(1, 2)

    def _pair(self, key: str) -> tuple[int, int]:
        assert self.convolution is not None
        value = self.convolution[key]
        pair = (value, value) if isinstance(value, int) else tuple(value)
        neutral = 0 if key == "padding" else 1
        return (*pair, neutral)[:2] if len(self.parameter.shape) == 3 else pair

    def flat(self, output: Tensor) -> Tensor:
        """An output, or its gradient, as (samples, places, out)."""
        if self.convolution is None:
            output = output if output.dim() > 1 else output.unsqueeze(0)
            return output.reshape(len(output), -1, output.shape[-1])
        return output.flatten(2).transpose(1, 2)


def readable(call: Call) -> bool:
    """Whether `Call.rows` is defined: not for groups, 3-d convolutions and padding by name."""
    options = call.convolution
    if options is None:
        return True
    plain = call.parameter.dim() <= 4 and not isinstance(options["padding"], str)
    return bool(plain and options["groups"] == 1)


class Watch(TorchFunctionMode):
    """Calls a function after each application of a layer whose weight is among the given.

    Parameters
    ----------
    model : nn.Module
    weights : collection of str
        Names of the parameters to watch.
    after : callable
        Gets the `Call` and its output, and returns the output to go on with.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, object] | set[str],
        after: Callable[[Call, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters() if name in weights}
        self.after = after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function; look at it when it is one of the layers."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in _LINEAR and func not in _CONV:
            return output
        given = dict(zip(("input", "weight", "bias", *_CONV_ARGUMENTS), args, strict=False))
        given = {**given, **kwargs}
        name = self.names.get(id(given["weight"]))
        if name is None:
            return output
        options = None
        if func in _CONV:
            options = {key: given.get(key, value) for key, value in _CONV_ARGUMENTS.items()}
        call = Call(name, given["input"], given["weight"], given.get("bias"), options)
        return self.after(call, output)


_CONV_ARGUMENTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def run(model: nn.Module, inputs: Any) -> Any:
    """The model on the inputs of one batch."""
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return model(*args)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))
