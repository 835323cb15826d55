"""What changes in a model, noted down before any of it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from depgraph.tracing.caches import Cache, forget
from depgraph.tracing.modules import named_modules
from depgraph.tracing.placing import replace_tensors


@dataclass
class Edits:
    """What changes in a model: tensors by the identity of the old one, the rest by module name.

    Of caches the contents go; in place of a removed module, by any of its names, stands
    ``nn.Identity``.
    """

    tensors: dict[int, Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: dict[str, type[nn.Module]] = field(default_factory=dict)
    caches: frozenset[Cache] = frozenset()
    removed: list[str] = field(default_factory=list)

    def apply(self, model: nn.Module) -> None:
        """Make the changes in the model itself."""
        replace_tensors(model, self.tensors)
        forget(model, self.caches)
        self.apply_structure(model)

    def apply_structure(self, model: nn.Module) -> None:
        """Set attributes and generated forwards."""
        for name, module in named_modules(model).items():
            vars(module).update(self.attributes.get(name, {}))
            if name in self.classes:
                module.__class__ = self.classes[name]
        for name in self.removed:
            parent, _, key = name.rpartition(".")
            mode = model.get_submodule(name).training
            model.get_submodule(parent)._modules[key] = nn.Identity().train(mode)
