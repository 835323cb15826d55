"""Makes a saved model again: its dense form, its plans one after the other, then its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from depgraph.errors import DepgraphError
from depgraph.front import trace
from depgraph.plan import Plan
from depgraph.storing.find import SOURCE
from depgraph.storing.manifest import Manifest
from depgraph.storing.recipe import build
from depgraph.tracing.inputs import example_from_spec, set_modes, state_dtypes
from depgraph.tracing.meta import on_meta
from depgraph.tracing.modules import named_modules
from depgraph.tracing.placing import (
    cast,
    change_held,
    held,
    like,
    registered,
    registries,
    transient,
    without_data,
)

ATTRIBUTE = "attribute "
"""Before the path of a tensor that is held in an attribute, among the names of stored tensors."""


def rebuild(manifest: Manifest, model: nn.Module | None = None) -> nn.Module:
    """The structure of a saved model; its tensors are on the meta device.

    Parameters
    ----------
    manifest : Manifest
        Of any origin.
    model : nn.Module, optional
        The dense model; it stays as it is. By default what the recipe makes.

    Raises
    ------
    DepgraphError
        When there is neither model nor recipe, or a plan is not one for it.
    """
    if model is not None:
        dense = without_data(model)
    elif manifest.recipe is not None:
        dense = build(manifest.recipe, manifest.limit)
    else:
        raise DepgraphError(
            f"a {manifest.cls} has to be made by its own code ({manifest.why}); call depgraph.load("
            f"..., model={manifest.cls}(...)) with the model as it was before it was pruned"
        )
    tie(dense, manifest.ties)
    for i, plan in enumerate(manifest.plans):
        _set_classes(dense, manifest.classes[i : i + 1])
        replay(plan, dense)
    _set_classes(dense, manifest.classes[-1:])
    if manifest.recipe is not None:
        vars(dense)[SOURCE] = manifest.recipe
    return dense


def replay(plan: Plan, model: nn.Module) -> None:
    """Apply a plan of any origin, of which only the choice of units is taken, not the arithmetic.

    Raises
    ------
    DepgraphError
    """
    cast(model, state_dtypes(plan.state))
    set_modes(model, plan.state)
    graph = trace(model, example_from_spec(plan.inputs))
    sizes = {group.name: group.size for group in graph.prunable}
    if sizes != plan.sizes:
        odd = next(iter(dict(plan.sizes.items() ^ sizes.items())))
        raise DepgraphError(
            f"the plan is for another model: group '{odd[:80]}' has {sizes.get(odd)} units, not "
            f"{plan.sizes.get(odd)}; give the model that the plan was made for"
        )
    again = graph.plan({**plan.kept_units, **plan.choices}, plan.stock_scale)
    again.apply(model, inplace=True)


def _set_classes(model: nn.Module, counts: Sequence[int]) -> None:
    reset = getattr(model, "reset_classifier", None)
    if reset is not None and counts and counts[0] != getattr(model, "num_classes", None):
        with torch.device("meta"):
            reset(counts[0])


def tie(model: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Make tensors of several names one, and only those.

    Raises
    ------
    DepgraphError
        When they do not look the same.
    """
    own = registered(model)
    first = {name: names[0] for names in ties for name in names if names[0] in own}
    made: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in own.items():
        leader = first.get(name, name)
        if leader not in made:
            again = id(tensor) in seen  # it was tied before, and shall not be
            made[leader] = like(tensor, on_meta(tensor.detach())) if again else tensor
            seen.add(id(made[leader]))
        if made[leader].shape != tensor.shape:
            raise DepgraphError(f"'{name}' cannot be '{leader}': their shapes differ; save again")
    _register(model, {name: made[first.get(name, name)] for name in own})


def _register(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors where parameters and buffers of these names are, and where they are held."""
    before = registered(model)
    moved = {id(before[name]): tensor for name, tensor in reversed(list(tensors.items()))}
    for name, module in named_modules(model).items():
        for registry in registries(module):
            for key in registry:
                full = f"{name}.{key}".lstrip(".")
                if full in tensors and full in before:
                    registry[key] = tensors[full]
    change_held(model, lambda path, tensor: moved.get(id(tensor), tensor))


def stored_names(manifest: Manifest, model: nn.Module) -> tuple[set[str], set[str]]:
    """Names under which a model's tensors are stored: those of a state dict, and the others."""
    first = {name: names[0] for names in manifest.ties for name in names}
    away = transient(model)
    weights: set[str] = set()
    others = {f"{ATTRIBUTE}{path}" for path in held(model)}
    for name in registered(model):
        (others if first.get(name, name) in away else weights).add(first.get(name, name))
    return weights, others


def place(manifest: Manifest, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put stored tensors into the model that `rebuild` made, and set modes and requires_grad.

    Raises
    ------
    DepgraphError
        When a tensor is missing, too much, or of another shape or kind than the model has.
    """
    own = registered(model)
    first = {name: names[0] for names in manifest.ties for name in names}
    loose = {f"{ATTRIBUTE}{path}": tensor for path, tensor in held(model).items()}
    expected = {**loose, **{first.get(name, name): tensor for name, tensor in own.items()}}
    odd = next(iter(sorted(expected.keys() ^ tensors.keys())), None)
    if odd is not None:
        where = "the model has no" if odd in tensors else "the files have no"
        raise DepgraphError(f"the files do not fit the model: {where} '{odd[:200]}'; save it again")
    for name, tensor in expected.items():
        found = tensors[name]
        if found.shape != tensor.shape or _kind(found) != _kind(tensor):
            raise DepgraphError(
                f"the files do not fit the model: '{name}' is {_look(found)}, not {_look(tensor)}; "
                "save it again"
            )
    frozen = set(manifest.frozen)
    new: dict[str, Tensor] = {}
    for name, tensor in own.items():
        leader = first.get(name, name)
        if leader not in new:
            new[leader] = like(tensor, tensors[leader], leader not in frozen)
    _register(model, {name: new[first.get(name, name)] for name in own})
    change_held(model, lambda path, tensor: tensors.get(f"{ATTRIBUTE}{path}", tensor))
    set_modes(model, manifest.state)


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _look(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
