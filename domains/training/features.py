"""What a model computes before its logits, by hooks: no method of it is needed, or bypassed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from depgraph import DepgraphError
from depgraph.exporting.places import Places


class Features:
    """Watches a model inside a `with` block; `value` and `tokens` are of its last forward.

    `value` is the input of what timm's ``get_classifier`` gives (of both heads of a distilled
    model, side by side); of other models, the input of the linear layer that was called last.

    Parameters
    ----------
    model : nn.Module
    with_tokens : bool
        Whether `tokens` is wanted too, for which every module is watched.
    """

    def __init__(self, model: nn.Module, with_tokens: bool = False) -> None:
        self.places = Places(model) if with_tokens else None
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
        if self.places is not None:
            self.places.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()
        if self.places is not None:
            self.places.__exit__()

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.heads:
            self._inputs.clear()
        self._inputs[module] = args[0]

    @property
    def tokens(self) -> Tensor:
        """All tokens or the feature map before the head; of a model without such, `value`."""
        last = None if self.places is None else self.places.last
        return self.value if last is None else last

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
def token_shape(model: nn.Module, images: Tensor) -> tuple[int, ...]:
    """Shape of the tokens of one image, for a model in eval mode, wherever it is."""
    home = next((tensor.device for tensor in model.parameters()), images.device)
    with Features(model, with_tokens=True) as features:
        model(images.to(home))
        return tuple(features.tokens.shape[1:])
