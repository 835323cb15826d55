"""What a folder has to hold of a model, found and proven before any of it is written."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from depgraph.errors import DepgraphError
from depgraph.plan import Plan
from depgraph.storing.checkpoint import is_storable
from depgraph.storing.find import candidates, class_counts
from depgraph.storing.manifest import FORMAT, Manifest
from depgraph.storing.outline import Facts, facts, first_difference, ops
from depgraph.storing.recipe import LIBRARIES, Recipe, as_recipe, installed
from depgraph.storing.replay import ATTRIBUTE, place, rebuild
from depgraph.tracing.caches import Cache, forget
from depgraph.tracing.hooks import check_no_hooks
from depgraph.tracing.inputs import state
from depgraph.tracing.meta import on_meta
from depgraph.tracing.modules import named_modules, structural_copy
from depgraph.tracing.placing import held, registered, transient


@dataclass(frozen=True)
class Saved:
    """What is to be written of a model.

    Attributes
    ----------
    manifest : Manifest
    weights : dict of str to Tensor
        Parameters and persistent buffers, tied ones once.
    others : dict of str to Tensor
        Other buffers, and tensors held in attributes.
    config : dict
        What timm's hub form says of a model; little more than the class for others.
    """

    manifest: Manifest
    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    config: dict[str, Any]


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that made a model what it is, earliest first; none for a dense model.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    tuple of Plan
    """
    return tuple(vars(model).get("depgraph_plans", ()))


@torch.no_grad()
def describe(model: nn.Module, source: Any = None) -> Saved:
    """Find and prove what makes a model again.

    Parameters
    ----------
    model : nn.Module
        Its parameters and persistent buffers may lie on the meta device.
    source : tuple or mapping, optional
        See `depgraph.save`.

    Raises
    ------
    DepgraphError
        When the source does not make the model, or a tensor cannot be saved.
    """
    return _Description(model).proven(source)


class _Description:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.plans = plans_of(model)
        self.tensors = registered(model)
        self.ties = _ties(self.tensors)
        first = {name: names[0] for names in self.ties for name in names}
        away = transient(model)
        self.weights: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            check_no_hooks(name, tensor, "the parameter that load makes")
            if first.get(name, name) == name:
                (self.others if name in away else self.weights)[name] = tensor.detach()

    def proven(self, source: Any) -> Saved:
        """The manifest of the first recipe that makes the model, or of none."""
        given = None if source is None else as_recipe(source)
        plain = self._manifest(None, "")
        why = "no library is known to make it"
        for recipe in candidates(self.model, self.plans) if given is None else [given]:
            manifest = self._manifest(recipe, "")
            odd = self._unlike(manifest)
            if odd is None:
                return self._saved(dataclasses.replace(manifest, ops=self._ops[0]))
            why = f"'{recipe['name']}' of {recipe['library']} does not make it: {odd}"
            if given is not None:
                raise DepgraphError(
                    f"the model cannot come back from source={source!r}: {odd}; give the source "
                    "that makes it, or undo the change, or save without one and load it with model="
                )
        found = facts(self.model, self._ops[1])
        return self._saved(
            dataclasses.replace(
                plain, why=why[:400], facts=found, ops=self._ops[0], key=secrets.token_hex(16)
            )
        )

    def _saved(self, manifest: Manifest) -> Saved:
        loose = {f"{ATTRIBUTE}{path}": t.detach() for path, t in self._loose.items()}
        others = {**self.others, **loose}
        _check_tensors(self.weights, others)
        return Saved(manifest, self.weights, others, _config(self.model))

    @cached_property
    def _ops(self) -> tuple[Facts, frozenset[Cache]]:
        """Outline of the model's own forward; empty where there are no inputs to trace it with."""
        return ops(self.model, self.plans[-1]) if self.plans else ({}, frozenset())

    @cached_property
    def _loose(self) -> dict[str, Tensor]:
        model = self.model
        if self._ops[1]:
            model = structural_copy(model)
            forget(model, self._ops[1])
        return held(model)

    def _manifest(self, recipe: Recipe | None, why: str) -> Manifest:
        modes = {name: module.training for name, module in named_modules(self.model).items()}
        frozen = [
            name
            for name, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        ]
        return Manifest(
            cls=type(self.model).__name__,
            recipe=recipe,
            why=why,
            plans=self.plans,
            classes=tuple(class_counts(self.model, self.plans)),
            ties=self.ties,
            state=state(modes, {}),
            frozen=tuple(frozen),
            versions={name: installed(name) for name in ("torch", "depgraph-prune", *LIBRARIES)},
        )

    def _unlike(self, manifest: Manifest) -> str | None:
        """The first thing in which what the manifest makes differs from the model."""
        try:
            built = rebuild(manifest)
            loose = {f"{ATTRIBUTE}{path}": tensor for path, tensor in self._loose.items()}
            tensors = {**self.weights, **self.others, **loose}
            place(manifest, built, {name: on_meta(tensor) for name, tensor in tensors.items()})
            found, caches = ops(built, self.plans[-1]) if self.plans else ({}, frozenset())
        except DepgraphError as error:
            return str(error)
        odd = first_difference(self._ops[0], found)
        if odd is None:
            odd = first_difference(facts(built, caches), facts(self.model, caches))
        return None if odd is None else f"{odd} is another one"


def _ties(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return tuple(tuple(same) for same in names.values() if len(same) > 1)


def _check_tensors(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no file can hold, and those that are parts of each other's memory."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in {**weights, **others}.items():
        strided = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
        if nn.parameter.is_lazy(tensor) or not strided or not is_storable(tensor.dtype):
            raise DepgraphError(
                f"'{name}' is a {type(tensor).__name__} of {tensor.dtype}, which safetensors does "
                "not hold; turn it into a plain tensor before saving"
            )
        if tensor.is_meta:
            if name in others:
                raise DepgraphError(f"'{name}' is on the meta device, and so has no values to save")
        elif tensor.numel():
            start = tensor.data_ptr()
            size = 1 + sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            storage = tensor.untyped_storage().data_ptr()
            spans.setdefault(storage, []).append((start, start + size * tensor.itemsize, name))
    for found in spans.values():
        found.sort()
        for (_, end, name), (start, _, other) in pairwise(found):
            if start < end:
                raise DepgraphError(
                    f"'{name}' and '{other}' share memory, which a folder does not hold; give one "
                    "of them a copy, or register the same tensor under both names"
                )


def _config(model: nn.Module) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None)
    config: dict[str, Any] = {"architecture": type(model).__name__, "depgraph_format": FORMAT}
    if isinstance(cfg, dict):
        plain = {key: value for key, value in cfg.items() if _is_plain(value)}
        config["architecture"] = plain.get("architecture", config["architecture"])
        config["pretrained_cfg"] = plain
    for name in ("num_classes", "num_features"):
        value = getattr(model, name, None)
        if isinstance(value, int):
            config[name] = value
    return config


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
