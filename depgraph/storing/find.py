"""Guesses how a model was made, from what it says of itself; `depgraph.save` proves or drops it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from math import prod
from typing import Any

from torch import nn

from depgraph.errors import DepgraphError
from depgraph.plan import Plan, Spec
from depgraph.storing.recipe import LIBRARIES, Recipe, as_recipe, build, config_arguments
from depgraph.tracing.placing import registered

SOURCE = "_depgraph_source"
"""Attribute of a model that holds its recipe, where it is known."""

_ENOUGH = 1 << 20
"""Modules and parameters of a model that this process itself asks for."""

Shapes = dict[str, tuple[int, ...]]


def set_source(model: nn.Module, source: Any) -> nn.Module:
    """Note down how a model was made, for `depgraph.save`; what is pruned of it keeps the note.

    Parameters
    ----------
    model : nn.Module
    source : tuple or mapping
        See `depgraph.save`.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    DepgraphError
        When it does not say how.
    """
    vars(model)[SOURCE] = as_recipe(source)
    return model


def source_of(model: nn.Module) -> Recipe | None:
    """How a model was made, where `set_source` or `depgraph.load` noted it down."""
    return vars(model).get(SOURCE)


def is_of_library(model: nn.Module) -> bool:
    """Whether a library may have made a model, whose constructor is known by name."""
    package = type(model).__module__.partition(".")[0]
    return source_of(model) is not None or package in LIBRARIES


def dense_shapes(model: nn.Module, plans: Sequence[Plan]) -> Shapes:
    """Shape of each parameter that the model had before its plans."""
    if not plans:
        return {name: tuple(tensor.shape) for name, tensor in registered(model).items()}
    sizes = plans[0].sizes
    return {
        name: tuple(size_of(spec, sizes) for spec in specs) for name, specs in plans[0].axes.items()
    }


def size_of(spec: Spec, sizes: dict[str, int]) -> int:
    if isinstance(spec, int):
        return spec
    if isinstance(spec, str):
        return sizes[spec]
    head, *rest = spec
    parts = [size_of(part, sizes) for part in rest]
    return prod(parts) if head == "x" else sum(parts)


def class_counts(model: nn.Module, plans: Sequence[Plan]) -> list[int]:
    """Outputs of a timm model's classifier when each plan was applied, and now.

    Empty where a model does not say, or a plan has no such layer.
    """
    layer, now = _first(_cfg(model).get("classifier")), getattr(model, "num_classes", None)
    if not hasattr(model, "reset_classifier") or layer is None or type(now) is not int:
        return []
    counts = []
    for plan in plans:
        specs = plan.axes.get(f"{layer}.weight")
        if specs is None or not isinstance(specs[0], int):
            return []
        counts.append(specs[0])
    return [*counts, now]


def candidates(model: nn.Module, plans: Sequence[Plan]) -> Iterator[Recipe]:
    """Recipes that may have made a model, the likeliest first.

    Parameters
    ----------
    model : nn.Module
    plans : sequence of Plan
        That were applied to it since.
    """
    noted = source_of(model)
    if noted is not None:
        yield noted
    package = type(model).__module__.partition(".")[0]
    shapes = dense_shapes(model, plans)
    if package == "timm":
        yield from _of_timm(model, plans, shapes)
    elif package == "transformers":
        config = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            yield from _plain("transformers", type(model).__name__, config_arguments(config))
    elif package == "torchvision":
        yield from _of_torchvision(model, shapes)


def _plain(library: str, name: str, arguments: Any) -> Iterator[Recipe]:
    try:
        yield as_recipe((library, name, arguments))
    except DepgraphError:
        return  # an argument that is not plain: then there is no recipe


def _cfg(model: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return cfg if isinstance(cfg, dict) else dict(vars(cfg))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _of_timm(model: nn.Module, plans: Sequence[Plan], shapes: Shapes) -> Iterator[Recipe]:
    cfg = _cfg(model)
    architecture = cfg.get("architecture")
    for name in [f"{architecture}.{cfg['tag']}"] if cfg.get("tag") else []:
        yield from _guessed(model, name, plans, shapes)
    yield from _guessed(model, architecture, plans, shapes)


def _guessed(
    model: nn.Module, name: Any, plans: Sequence[Plan], shapes: Shapes
) -> Iterator[Recipe]:
    """The name, alone and with the arguments in which the model differs from what that makes."""
    try:
        plain = as_recipe(("timm", name))
        base = build(plain, _ENOUGH)
    except DepgraphError:
        return
    if _fits(shapes, base):
        yield plain
    known = arguments_of(base)
    arguments = {k: v for k, v in _differing(model, base, plans, shapes) if k in known}
    if arguments:
        yield from _plain("timm", str(name), arguments)


def arguments_of(model: nn.Module) -> list[str]:
    """Names of what the constructors of a model's class and of those it is made from take."""
    classes = [cls for cls in type(model).__mro__ if "__init__" in vars(cls) and cls is not object]
    return list(dict.fromkeys(key for cls in classes for key in signature(cls).parameters))


def _fits(shapes: Shapes, base: nn.Module) -> bool:
    """Whether a model has parameters of these names and shapes, and no others."""
    found = dense_shapes(base, ())
    return all(found.get(name) == shape for name, shape in shapes.items())


def _differing(
    model: nn.Module, base: nn.Module, plans: Sequence[Plan], shapes: Shapes
) -> Iterator[tuple[str, Any]]:
    for key in arguments_of(base):
        for own, other in ((model, base), *zip(model.children(), base.children(), strict=False)):
            value, usual = vars(own).get(key), vars(other).get(key)
            if type(value) is type(usual) and value != usual and key not in _CUT:
                yield key, value
                break
    blocks, usual_blocks = getattr(model, "blocks", ()), getattr(base, "blocks", ())
    if isinstance(blocks, nn.Module) and len(list(blocks)) != len(list(usual_blocks)):  # type: ignore[call-overload]
        yield "depth", len(list(blocks))  # type: ignore[call-overload]
    before = dense_shapes(base, ())
    cfg = _cfg(base)
    for key, layer, dim in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        weight = f"{_first(cfg.get(layer))}.weight"
        if weight in shapes and weight in before and shapes[weight][dim] != before[weight][dim]:
            yield key, shapes[weight][dim]
    for key, group in _CUT.items():
        found = numbers_of(model, key)
        if plans:
            sizes = plans[0].sizes.items()
            found = {size for name, size in sizes if name.rpartition(".")[2] == group}
        if len(found) == 1 and found != numbers_of(base, key):
            yield key, found.pop()


def numbers_of(model: nn.Module, key: str) -> set[int]:
    """What the modules of a model have in an attribute, where that is a number."""
    return {m.__dict__[key] for m in model.modules() if type(m.__dict__.get(key)) is int}


_CUT = {"embed_dim": "embed", "num_heads": "heads"}
"""Arguments that a plan changes, and the group that says what they were."""


def _of_torchvision(model: nn.Module, shapes: Shapes) -> Iterator[Recipe]:
    from torchvision import models

    layers = [name for name, shape in shapes.items() if len(shape) == 2]
    classes = shapes[layers[-1]][0] if layers else None
    for name in models.list_models():
        if models.get_model_builder(name).__module__ == type(model).__module__:
            for arguments in ({}, {"num_classes": classes}):
                recipe = as_recipe(("torchvision", name, arguments))
                try:
                    fits = _fits(shapes, build(recipe, _ENOUGH))
                except DepgraphError:
                    continue  # it cannot be made without data, or not with these arguments
                if fits:
                    yield recipe
                    break
