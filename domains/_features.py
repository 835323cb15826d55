"""What a model's classifier reads, by hooks: no method of the model is needed, or bypassed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from depgraph import DepgraphError


class Features:
    """Watches a model inside a `with` block; `value` is of its last forward.

    Watched is the input of what timm's ``get_classifier`` gives (of both heads of a distilled
    model, side by side); of other models, the input of the linear layer that was called last.
    """

    def __init__(self, model: nn.Module) -> None:
        self.heads = _classifiers(model)
        self.watched = self.heads or [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not self.watched:
            raise DepgraphError(
                "the model has no linear layer whose input could serve as its features; choose an "
                "algorithm and recipe without features"
            )
        self._inputs: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Features:
        self._handles = [m.register_forward_pre_hook(self._see) for m in self.watched]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.heads:
            self._inputs.clear()
        self._inputs[module] = args[0]

    @property
    def value(self) -> Tensor:
        """Shape (batch, width)."""
        if not self._inputs:
            raise DepgraphError("the model did not call its classifier, so it has no features")
        found = [
            self._inputs[module].flatten(1) for module in self.watched if module in self._inputs
        ]
        return torch.cat(found, dim=1)


def _classifiers(model: nn.Module) -> list[nn.Module]:
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else ()
    heads = found if isinstance(found, tuple | list) else (found,)
    return [head for head in heads if isinstance(head, nn.Linear)]


@torch.no_grad()
def feature_width(model: nn.Module, images: Tensor) -> int:
    """Width of the features of a model in eval mode, wherever it is."""
    home = next((tensor.device for tensor in model.parameters()), images.device)
    with Features(model) as features:
        model(images.to(home))
        return features.value.shape[1]
