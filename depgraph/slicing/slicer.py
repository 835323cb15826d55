"""Works out what has to change in a model for a plan: tensors, attributes, forwards."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.costing.cost import value_shape
from depgraph.coupling.axes import (
    axis_atoms,
    kept_indices,
    select_indices,
)
from depgraph.errors import DepgraphError
from depgraph.graph import DependencyGraph
from depgraph.plan import Plan
from depgraph.rescaling.masks import compact
from depgraph.rescaling.temperature import multiply
from depgraph.rewriting.attributes import layer_attributes
from depgraph.rewriting.rewrite import Rewriter
from depgraph.slicing.edits import Edits
from depgraph.slicing.fitting import Fitting
from depgraph.slicing.rescaling import Rescalings
from depgraph.slicing.verify import Mismatch
from depgraph.tracing.hooks import check_no_hooks
from depgraph.tracing.trace import (
    named_tensors,
)

_FUSED = (nn.TransformerEncoderLayer,)
"""torch's modules that hand their children's parameters to one fused kernel in evaluation."""


class Slicer(Fitting):
    """Works out, from graph and plan, what has to change in one model."""

    def __init__(self, graph: DependencyGraph, plan: Plan, model: nn.Module) -> None:
        super().__init__(graph, plan, model)
        self._reconsidered: set[str] = set()
        self.rescalings = Rescalings(
            graph,
            self.sizes,
            model,
            self.modules,
            partial(self.own_tensors, recurse=True),
            self.predicted,
            plan.stock_scale,
        )
        # many parameters share an axis
        self._indices = cache(partial(kept_indices, kept=self.kept))
        called = {call.name for p in graph.in_modes for call in p.trace.calls}
        self._rewriter = Rewriter(self.p, self.kept, model, self.removed(), called)

    def new_tensors(self, share: bool) -> dict[int, Tensor]:
        """The tensor to put in place of each old one; unpruned ones are shared or copied."""
        tensors, _ = named_tensors(self.model)
        new: dict[int, Tensor] = {}
        for name, old in tensors.items():
            value = self._sliced(name, old.detach())
            plain = old.layout == torch.strided
            if not share and (not plain or value.data_ptr() == old.data_ptr()):
                value = value.clone()
            if isinstance(old, nn.Parameter):
                check_no_hooks(name, old, "the parameter of the pruned model")
                value = nn.Parameter(value, requires_grad=old.requires_grad)
            new[id(old)] = value
        return new

    def rescale(self, edits: Edits) -> None:
        """Multiply, in place, the new weights that make up for another temperature."""
        tensors, _ = named_tensors(self.model)
        for name, mask, factor in self.rescalings.factors:
            mask = compact(mask)
            indices = self._kept_indices(name)
            varied = {dim: here for dim, here in indices.items() if mask.shape[dim] > 1}
            new = edits.tensors[id(tensors[name])].detach()
            multiply(new, select_indices(mask, varied), factor)

    def _sliced(self, name: str, tensor: Tensor) -> Tensor:
        indices = self._kept_indices(name).items()
        return select_indices(tensor, {dim: here.to(tensor.device) for dim, here in indices})

    def _kept_indices(self, name: str) -> dict[int, Tensor]:
        node = self.graph.traced.tensors.get(name)
        return {
            dim: self._indices(axis)
            for dim, axis in enumerate(self.p.axes(node))
            if any(atom in self.kept for atom in axis_atoms(axis))
        }

    def removed(self) -> list[str]:
        """Every name of each module of which nothing is needed any more."""
        dead = {id(self.modules[name]) for name in self.graph.dead(self.sizes).modules}
        every = self.model.named_modules(remove_duplicate=False)
        return [name for name, module in every if id(module) in dead]

    def add_attributes(self, edits: Edits) -> None:
        """Integers of every module that name a pruned size."""
        for name, module in self.modules.items():
            nodes = self.own_nodes(module)
            shapes = {local: value_shape(self.p, node, self.sizes) for local, node in nodes.items()}
            attributes = layer_attributes(module, shapes, self.groups(name))
            if not attributes:
                attributes = self.likeliest(name)
            if attributes:
                edits.attributes[name] = attributes

    def add_classes(self, edits: Edits) -> None:
        """Rewritten forwards where no weights make up for a temperature.

        An attention that loses head dims has another temperature: a fused one takes its default
        scale from the width it sees, and a module may switch between the fused and the written-out
        form at any time.
        """
        generated = self.rescalings.find()
        known: dict[Any, str] = {}
        hopeless: set[type] = set()  # where no attributes help one module, none will help the next
        for name in self.rescalings.kept:
            cls = type(self.modules[name])
            fits = self.fits(name, edits, known)
            if not fits and (cls in hopeless or not self.refit(name, edits, known)):
                hopeless.add(cls)
                generated.add(name)
        for name in self.modules:
            # a softmax that is a module of its own computes no temperature: whoever calls it does
            if self.calls.get(name) and name in generated and not self.is_layer(name):
                edits.classes[name] = self.generated(name)
        self.rescalings.note(edits)

    def unfit(self, edits: Edits, small: nn.Module) -> list[str]:
        """Modules that need a generated forward though the trace of the sliced model is right.

        A fused kernel would call past the generated forward of a child, and weights may not make
        up for what another mode computes.
        """
        return self.rescalings.unproven(small) + [
            name
            for name, module in self.modules.items()
            if isinstance(module, _FUSED)
            and name not in edits.classes
            and any(inner.startswith(f"{name}.") for inner in edits.classes)
        ]

    def repair(self, mismatch: Mismatch | None, edits: Edits, small: nn.Module) -> None:
        """Other attributes, or else a generated forward, for the innermost module to blame.

        Raises
        ------
        Mismatch
            The one given, when there is no such module.
        """
        if mismatch is None:
            names = self.unfit(edits, small)
        elif mismatch.of_number:
            names = self.rescalings.computing(mismatch.module)
        else:
            names = []
        if names:
            edits.classes.update((name, self.generated(name)) for name in names)
        elif mismatch is not None:
            self._repair(mismatch, edits)
        self.rescalings.note(edits)

    def _repair(self, mismatch: Mismatch, edits: Edits) -> None:
        path = mismatch.module
        while path in edits.classes or not self.calls.get(path) or self.is_layer(path):
            if not path:
                path = self._culprit(edits, mismatch)
                break
            path = path.rpartition(".")[0]
        alike = [
            name
            for name, module in self.modules.items()
            if type(module) is type(self.modules[path])
            and self.calls.get(name)
            and name not in edits.classes
        ]
        first = path not in self._reconsidered
        self._reconsidered.update(alike)
        known: dict[Any, str] = {}  # of modules with the same choice one is tried; verify sees all
        if first and self.refit(path, edits, known):
            lost = [name for name in alike if name != path and not self.refit(name, edits, known)]
        else:
            lost = [name for name in alike if not first or not self.fits(name, edits, known)]
            lost += [] if path in lost else [path]
        try:
            edits.classes.update((name, self.generated(name)) for name in lost)
        except DepgraphError as error:
            text = f"{mismatch}; a forward of other sizes cannot be generated either: {error}"
            raise DepgraphError(text) from error

    def _culprit(self, edits: Edits, mismatch: Mismatch) -> str:
        """The innermost module that gives other shapes than predicted, though its inputs fit.

        A dimension of which one unit is left broadcasts, and the error shows elsewhere.
        """
        for name in sorted(self.calls, key=lambda name: -name.count(".")):
            known = not name or name in edits.classes or self.is_layer(name)
            if not known and self.trouble(name, edits.attributes.get(name, {}), edits):
                return name
        raise mismatch

    def generated(self, name: str) -> type[nn.Module]:
        """The class of a module with its forward generated for the plan."""
        module = self.modules[name]
        self._check_picks(name)
        tensors = self.own_tensors(module, recurse=True)
        return self._rewriter.rewritten(module, self.calls[name][0], tensors)

    def _check_picks(self, name: str) -> None:
        """Refuse to rewrite a forward whose trace had to assume how many entries it picks."""
        traced = self.graph.traced
        found = [node for node in traced.assumed if traced.owner.get(node, "") == name]
        if found:
            where = f"module '{name}'" if name else "the model"
            raise DepgraphError(
                f"{where} ({type(self.modules[name]).__name__}) picks as many entries as the data "
                f"says ({found[0].meta['source']}), so that its forward cannot be rewritten for "
                "other sizes; prune its parts by themselves"
            )
