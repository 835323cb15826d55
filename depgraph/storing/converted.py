"""Checkpoints that transformers wrote under other names, or in other pieces, than a model's.

Since version 5 its classes have names of their own for modules, and all experts of a layer in one
parameter; what is on disk keeps the names it always had. The library's own table says what becomes
of what, and its own code converts, one tensor of the model at a time, by experts where it can.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.errors import DepgraphError
from depgraph.storing.checkpoint import Checkpoint, Stored


def as_named_by(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint under the names of a model's tensors.

    Parameters
    ----------
    model : nn.Module
        On any device, ``meta`` included.
    checkpoint : Checkpoint

    Returns
    -------
    Checkpoint
        The same where the names fit already, and for models that are not of transformers.

    Raises
    ------
    DepgraphError
        When the library cannot convert what is there.
    """
    if checkpoint.tensors.keys() <= model.state_dict(keep_vars=True).keys():
        return checkpoint
    if not hasattr(model, "base_model_prefix") or not find_spec("transformers"):
        return checkpoint
    if not find_spec("transformers.conversion_mapping"):
        return checkpoint  # before version 5 all names were those of the modules
    return _Converted(model, checkpoint)


@dataclass
class _Recipe:
    """What a converter makes tensors of the model of: names on disk, by the converter's patterns.

    Attributes
    ----------
    first : str
        The converter's name for what it makes.
    converter : object
        Of transformers.
    sources : dict of str to list of str
    """

    first: str
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    def made(self, model: nn.Module, tensors: Mapping[str, Tensor], only: int | None = None) -> Any:
        """What becomes of these tensors; with a number, of those of one expert."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names if only is None else names[only : only + 1]:
                converter.add_tensor(self.first, name, pattern, tensors[name])
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}

    @property
    def experts(self) -> int:
        """Into how many parts the recipe can be done, each a range of the first dimension."""
        operations: list[Any] = getattr(self.converter, "operations", [])
        counts = {len(names) for names in self.sources.values()}
        stacks = bool(operations) and type(operations[0]).__name__ == "MergeModulelist"
        apart = stacks and operations[0].dim == 0
        within = all(getattr(op, "dim", 0) > 0 for op in operations[1:])
        return counts.pop() if apart and within and len(counts) == 1 else 1


class _Converted(Checkpoint):
    """A checkpoint in terms of a model's tensors."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.directory, self.files = checkpoint.directory, checkpoint.files
        self._model, self._stored = model, checkpoint
        self._recipe: dict[str, _Recipe] = {}
        self.tensors = {}
        looks = {
            name: torch.empty(x.shape, dtype=x.dtype, device="meta")
            for name, x in checkpoint.tensors.items()
        }
        for recipe in _recipes(model, checkpoint):
            file = checkpoint.tensors[next(iter(recipe.sources.values()))[0]].file
            for name, made in self._converted(recipe, looks).items():
                self._recipe[name] = recipe
                self.tensors[name] = Stored(file, tuple(made.shape), made.dtype)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor in pieces along its first dimension: by experts, or whole where converted."""
        recipe = self._recipe[name]
        sources = list(recipe.sources.values())
        if not hasattr(recipe.converter, "operations"):  # another name, and nothing else
            yield from self._stored.pieces(sources[0][0])
            return
        start = 0
        for i in range(recipe.experts):
            only = i if recipe.experts > 1 else None
            wanted = [x for names in sources for x in (names if only is None else [names[only]])]
            piece = self._converted(recipe, {x: self._whole(x) for x in wanted}, only)[name]
            yield start, piece
            start += len(piece) if piece.dim() else 1

    def _whole(self, name: str) -> Tensor:
        pieces = [piece for _, piece in self._stored.pieces(name)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _converted(
        self, recipe: _Recipe, tensors: Mapping[str, Tensor], only: int | None = None
    ) -> dict[str, Tensor]:
        try:
            made: dict[str, Tensor] = recipe.made(self._model, tensors, only)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DepgraphError(
                f"'{self.directory}': transformers cannot make '{recipe.first}' of what is there "
                f"({type(error).__name__}: {error}); load the model with it and save it with "
                "depgraph.save"
            ) from error
        return made


def _recipes(model: nn.Module, checkpoint: Checkpoint) -> list[_Recipe]:
    """What becomes of each stored tensor, as ``from_pretrained`` has it."""
    loading = import_module("transformers.core_model_loading")
    mapping = import_module("transformers.conversion_mapping")
    steps = mapping.get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found: dict[str, _Recipe] = {}
    for name in sorted(checkpoint.tensors, key=loading.dot_natural_key):
        new, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, pattern = name, None
        if new not in state and any(re.search(text, new) for text in ignored):
            continue
        step = loading.WeightRenaming(name, new) if pattern is None else by_pattern[pattern]
        recipe = found.setdefault(new, _Recipe(new, step))
        recipe.sources.setdefault(pattern or name, []).append(name)
    return list(found.values())
