"""Keeps a pruned model from writing weights beside a configuration of other sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from depgraph.errors import DepgraphError
from depgraph.tracing.modules import named_modules, structural_copy

METHOD = "save_pretrained"
"""Method of libraries' models that writes weights beside what the constructor was told."""


class Guard:
    """In place of a method of one pruned model, or of a model within it.

    Parameters
    ----------
    model : nn.Module
    root : nn.Module
        The whole model, which has the plans.
    """

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        self.model = model
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the model where its library's configuration can say its sizes.

        Raises
        ------
        DepgraphError
            Where it cannot: what would be written could not be loaded.
        """
        from depgraph.storing.standard import (
            make_standard,  # which applies plans, as what puts this here
        )

        stock = structural_copy(self.root)
        try:
            if self.model is not self.root:
                raise DepgraphError("it is a part of a pruned model")
            make_standard(stock)
        except DepgraphError as error:
            raise DepgraphError(
                f"this {type(self.model).__name__} is pruned to sizes that its configuration "
                "cannot say; write the whole model with depgraph.save(model, directory) and read "
                "it with depgraph.load(directory), or prune it with pruners.prune(..., "
                "standard=True)"
            ) from error
        return getattr(stock, METHOD)(*args, **kwargs)


def guard(model: nn.Module) -> None:
    """Put guards on a pruned model, and on the models within it that could be written alone."""
    for module in named_modules(model).values():
        if callable(getattr(type(module), METHOD, None)):
            vars(module)[METHOD] = Guard(module, model)


def unguard(model: nn.Module) -> None:
    """Take the guards off again."""
    for module in named_modules(model).values():
        vars(module).pop(METHOD, None)
