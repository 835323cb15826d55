"""How a dense model is made: a library, a name that it knows, and plain arguments.

A recipe may come from a stranger's folder. It reaches a constructor of an installed library only
after its name was found in that library's own list, and every argument was seen to be a number, a
truth value, a short word, or a list or mapping of these: none that could name a file, an address, a
checkpoint or code.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from depgraph.errors import DepgraphError
from depgraph.storing.arguments import check_value, listed
from depgraph.tracing.meta import made_on_meta

Recipe = dict[str, Any]
"""``{"library": "timm", "name": "vit_base_patch16_224", "arguments": {"num_classes": 7}}``."""

IMPLEMENTATION = "attn_implementation"
"""The argument of transformers that says which attention function runs."""

_SOURCE = 'write source=("timm", name, {argument: value}), or "torchvision" or "transformers" first'

_NAME = re.compile(r"[\w-]+")
"""Of a module or parameter, some of which come from arguments: they appear in generated code."""


def as_recipe(source: Any) -> Recipe:
    """A recipe from what a user writes down.

    Parameters
    ----------
    source : tuple or mapping
        ``("timm", name, {argument: value})``, arguments optional, likewise for ``"torchvision"``;
        for ``"transformers"`` the name of a class and its configuration or the dict of that.

    Returns
    -------
    dict

    Raises
    ------
    DepgraphError
        When it is none, or an argument is not plain; see `check`.
    """
    if isinstance(source, Mapping):
        recipe = dict(source)
    elif isinstance(source, (tuple, list)) and 2 <= len(source) <= 3:
        library, name, *rest = source
        given = rest[0] if rest else {}
        arguments = config_arguments(given) if hasattr(given, "to_dict") else given
        recipe = {"library": library, "name": name, "arguments": arguments}
    else:
        raise DepgraphError(f"source={source!r} does not say how the model is made; {_SOURCE}")
    recipe = {**recipe, "arguments": listed(recipe.get("arguments", {}))}
    check(recipe)
    return recipe


def config_arguments(config: Any) -> dict[str, Any]:
    """A configuration of transformers as plain data, without what says where it is from."""
    arguments = _without_origin(config.to_dict())
    if getattr(config, "_attn_implementation", None) is not None:
        arguments[IMPLEMENTATION] = config._attn_implementation
    return arguments


def check_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a ``config.json`` of transformers; refused as `check` refuses arguments."""
    arguments = _without_origin(config)
    check({"library": "transformers", "name": name, "arguments": arguments})
    return arguments


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments for timm that could name a file, an address or code; see `check`."""
    check({"library": "timm", "name": name, "arguments": listed(arguments)})


ORIGIN = frozenset({"_name_or_path", "transformers_version", "architectures", "auto_map"})
"""Entries of a configuration that say where it is from, and nothing of what it makes."""


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_origin(v) for k, v in value.items() if k not in ORIGIN}
    return [_without_origin(v) for v in value] if isinstance(value, (list, tuple)) else value


def check(recipe: Any) -> None:
    """Refuse what is no recipe, or has an argument that might be more than plain data.

    Raises
    ------
    DepgraphError
        Naming the argument.
    """
    if not isinstance(recipe, dict) or set(recipe) != {"library", "name", "arguments"}:
        raise DepgraphError(f"a recipe has library, name and arguments; {_SOURCE}")
    if not isinstance(recipe["library"], str) or recipe["library"] not in _MAKERS:
        raise DepgraphError(
            f"models are made by {', '.join(_MAKERS)}, not by {str(recipe['library'])[:60]!r}; "
            "leave source out, and give load a model"
        )
    if not isinstance(recipe["name"], str) or not isinstance(recipe["arguments"], dict):
        raise DepgraphError(f"a recipe has a name that is text, and named arguments; {_SOURCE}")
    for key, value in recipe["arguments"].items():
        if not key.isidentifier():
            raise DepgraphError(f"argument {key[:60]!r} of a recipe is no name; {_SOURCE}")
        check_value(key, key, value)


def build(recipe: Recipe, limit: int) -> nn.Module:
    """Make the model on the meta device, by its library's own constructor.

    Parameters
    ----------
    recipe : dict
        Of any origin.
    limit : int
        Most modules and parameters that it may register: a constructor that makes more is stopped.

    Returns
    -------
    nn.Module

    Raises
    ------
    DepgraphError
        When the recipe is none, its library is not installed or does not know the name, or the
        constructor does not take the arguments.
    """
    check(recipe)
    library, name = recipe["library"], recipe["name"]
    try:
        import_module(library)
    except ImportError as error:
        raise DepgraphError(f"the model is made by {library}; pip install {library}") from error
    try:
        with _at_most(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = made_on_meta(lambda: _MAKERS[library](name, recipe["arguments"]))
    except DepgraphError:
        raise
    except Exception as error:  # a constructor may raise anything for odd arguments
        text = str(error).strip().partition("\n")[0][:200]
        raise DepgraphError(
            f"{library} {installed(library)} cannot make '{name[:80]}' with the arguments of the "
            f"recipe ({type(error).__name__}: {text}); make the model and give load model=..."
        ) from error
    if not isinstance(model, nn.Module):
        raise DepgraphError(f"'{name[:80]}' of {library} is no nn.Module")
    return model


def installed(library: str) -> str:
    """Version of a package; empty where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


@contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Stop a constructor of this thread that registers more, with data, or under odd names."""
    thread, count = threading.get_ident(), 0

    def registered(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            if not _NAME.fullmatch(name):
                raise DepgraphError(f"the recipe gives a part of the model the name {name[:60]!r}")
            if isinstance(value, Tensor) and not value.is_meta:
                raise DepgraphError(f"the recipe makes '{name}' with data, which load reads")
            count += 1
            if count > limit:
                raise DepgraphError(
                    f"the recipe makes more than {limit} modules and parameters, which is not the "
                    "model that the folder holds; save the model again"
                )

    hooks = (
        register_module_module_registration_hook(registered),
        register_module_parameter_registration_hook(registered),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tuples(value: Any) -> Any:
    """Lists as constructors write them themselves."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise DepgraphError(
            f"timm {installed('timm')} has no model '{name[:80]}'; timm.list_models() has them all"
        )
    return timm.create_model(name, pretrained=False, **_tuples(arguments))


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise DepgraphError(
            f"torchvision {installed('torchvision')} has no model '{name[:80]}'; "
            "torchvision.models.list_models() has them all"
        )
    builder = models.get_model_builder(name)
    parts = [key for key in signature(builder).parameters if key == "weights_backbone"]
    return builder(weights=None, **dict.fromkeys(parts), **_tuples(arguments))


def transformers_class(name: str) -> Any:
    """The model class that transformers exports by a name.

    Raises
    ------
    DepgraphError
        When there is none.
    """
    library: Any = import_module("transformers")
    known = name.isidentifier() and not name.startswith("_")
    cls = getattr(library, name, None) if known else None
    base = library.PreTrainedModel
    if not (isinstance(cls, type) and issubclass(cls, base)) or cls is base:
        raise DepgraphError(
            f"transformers {installed('transformers')} has no model class '{name[:80]}'; name one "
            "that it exports"
        )
    return cls


def _transformers(name: str, arguments: dict[str, Any]) -> nn.Module:
    made = transformers_class(name)
    _check_attributes(import_module("transformers").PreTrainedConfig, arguments)
    arguments = dict(arguments)
    implementation = arguments.pop(IMPLEMENTATION, None)
    config = made.config_class.from_dict(arguments)
    if implementation is not None:
        config._attn_implementation = implementation
    return made(config)


def _check_attributes(base: type, arguments: Any) -> None:
    """Refuse entries of configurations, which become attributes, that hide a method of theirs."""
    values = arguments.values() if isinstance(arguments, dict) else arguments
    for key in arguments if isinstance(arguments, dict) else ():
        if callable(getattr(base, key, None)):
            raise DepgraphError(f"a configuration has no entry '{key[:60]}': that is a method")
    for value in values:
        if isinstance(value, (dict, list)):
            _check_attributes(base, value)


_MAKERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
LIBRARIES = tuple(_MAKERS)
"""Libraries whose constructors a recipe may name."""
