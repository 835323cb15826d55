"""Calls of torch that make tensors of Python's numbers, or the reverse, past its dispatcher.

On the meta device ``torch.tensor([0.5], device=x.device)`` holds nothing, and no op tells of it.
Seeing these calls slows every other one down, so that only a forward that needs it is run so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from depgraph.tracing.recorder import Recorder

_MAKING = (torch.tensor, torch.as_tensor, torch.asarray)


class OutOfSight(TorchFunctionMode):
    """Makes literals with their values, which the recorder takes as constants of the forward.

    Parameters
    ----------
    recorder : Recorder
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and args[0].is_meta:
            return self._recorder.value_of(args[0]).tolist()
        if func is Tensor.numpy and args[0].is_meta:
            return self._recorder.value_of(args[0]).numpy()
        if func is Tensor.new_tensor and not isinstance(args[1], Tensor):
            return self._literal(torch.tensor, args[1:], {"dtype": args[0].dtype, **kwargs})
        if func in _MAKING and not isinstance(args[0], Tensor):
            return self._literal(func, args, kwargs)
        return func(*args, **kwargs)

    def _literal(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A tensor of numbers, wherever the forward thinks that it runs."""
        data = pytree.tree_map_only(Tensor, self._number, args[0])
        options = dict(zip(("dtype", "device"), args[1:], strict=False)) | kwargs
        tensor: Tensor = func(data, **{**options, "device": "cpu"})
        return tensor

    def _number(self, tensor: Tensor) -> Any:
        return self._recorder.value_of(tensor).tolist() if tensor.is_meta else tensor
