"""What a model computes last that still has places: all tokens, or a feature map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Places:
    """Watches a model inside a `with` block, by hooks: no method of it is needed, or bypassed.

    Attributes
    ----------
    last : Tensor or None
        Of the last forward: the last output of a module of which one sample is more than a vector.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Places:
        self._handles = [m.register_forward_hook(self._see) for m in self.model.modules()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.last = None

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() < 3:
            return
        if output[:1].numel() > max(output.shape[1:]):
            self.last = output
