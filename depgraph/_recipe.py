"""How a dense model is made: a library, a name that it knows, and plain arguments.

A recipe may come from a stranger's folder. It reaches a constructor of an installed library only
after its name was found in that library's own list, and every argument was seen to be a number, a
truth value, a short word, or a list or mapping of these: none that could name a file, an address, a
checkpoint or code.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from depgraph.errors import DepgraphError

Recipe = dict[str, Any]
"""``{"library": "timm", "name": "vit_base_patch16_224", "arguments": {"num_classes": 7}}``."""

MAX_INTEGER = 1 << 24
"""Largest integer among the arguments of a recipe: no vocabulary, image or context is larger."""

IMPLEMENTATION = "attn_implementation"
"""The argument of transformers that says which attention function runs."""

_SOURCE = 'write source=("timm", name, {argument: value}), or "torchvision" or "transformers" first'

_FORBIDDEN_WORDS = frozenset(
    {"pretrained", "checkpoint", "weights", "overlay", "code", "path", "file", "filename", "files"}
    | {"dir", "directory", "folder", "url", "uri", "hub", "repo", "cache"}
)
_FORBIDDEN = frozenset(
    {"auto_map", "kernel_config", "use_kernels", "quantization_config"}
    | {"backbone"}  # a name by which transformers reads a configuration
)
_SWITCHES = frozenset({"use_cache", "init_weights"})
_SIZES = frozenset({"pretrained_window_size", "pretrained_window_sizes"})
_LABELS = frozenset({"id2label", "label2id"})
"""Mappings between numbers and the names of classes, which may be any text."""
_IMPLEMENTATIONS = ("eager", "sdpa")
_LENGTHS = frozenset(
    {"depth", "depths", "layer", "layers", "blocks", "repeat", "repeats", "stages", "steps"}
    | {"iteration", "iterations", "iters", "loops"}
)
_MAX_LENGTH = 1024
"""Layers of a model."""
_MAX_DEPTH, _MAX_WORD = 16, 200
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
    recipe = {**recipe, "arguments": _listed(recipe.get("arguments", {}))}
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
    check({"library": "timm", "name": name, "arguments": _listed(arguments)})


ORIGIN = frozenset({"_name_or_path", "transformers_version", "architectures", "auto_map"})
"""Entries of a configuration that say where it is from, and nothing of what it makes."""


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_origin(v) for k, v in value.items() if k not in ORIGIN}
    return [_without_origin(v) for v in value] if isinstance(value, (list, tuple)) else value


def _listed(value: Any) -> Any:
    """Plain data as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


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
        _check_value(key, key, value, 0)


def _check_value(where: str, key: str, value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise DepgraphError(f"argument '{where[:60]}' of a recipe is nested too deeply")
    if key in _FORBIDDEN or not _FORBIDDEN_WORDS.isdisjoint(key.lower().split("_")):
        if not (_is_off(value) or (key in _SWITCHES and value is True) or _is_size(key, value)):
            raise DepgraphError(
                f"argument '{where[:60]}' of a recipe could name a file, an address or code; "
                "leave it out, or save without a source and give load a model"
            )
    elif key.endswith("implementation") and value not in (None, *_IMPLEMENTATIONS):
        raise DepgraphError(
            f"argument '{where[:60]}' of a recipe is none of {', '.join(_IMPLEMENTATIONS)}; set it "
            "after loading"
        )
    if isinstance(value, dict):
        for name, item in value.items():
            if not (key in _LABELS and type(item) in (str, int)):
                _check_value(f"{where}.{name}", str(name), item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(where, key, item, depth + 1)
    elif not _is_plain(value, largest := _largest(key)):
        raise DepgraphError(
            f"argument '{where[:60]}' of a recipe is {str(value)[:40]!r}; it may be a number up to "
            f"{largest}, true, false, null, or a word without a path or an address in it"
        )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_size(key: str, value: Any) -> bool:
    """Whether a value is a share (``drop_path_rate``), or sizes of what a model was trained on."""
    numbers = value if isinstance(value, list) else [value]
    if "pretrained" in key.split("_"):
        return key in _SIZES and all(type(number) is int for number in numbers)
    return all(type(number) is float and number < 1 for number in numbers)


def _largest(key: str) -> int:
    """The largest integer of an argument: forwards are as long as layers are many."""
    return MAX_INTEGER if _LENGTHS.isdisjoint(key.lower().split("_")) else _MAX_LENGTH


def _is_plain(value: Any, largest: int) -> bool:
    if isinstance(value, str):
        return (
            len(value) <= _MAX_WORD and not value.startswith(".") and not set(value) & set("/\\:~")
        )
    if type(value) is int:
        return abs(value) <= largest
    return value is None or type(value) is bool or (type(value) is float and math.isfinite(value))


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
        with torch.device("meta"), _at_most(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _MAKERS[library](name, recipe["arguments"])
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
    """Stop a constructor of this thread that registers more, or under names that are code."""
    thread, count = threading.get_ident(), 0

    def registered(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            if not _NAME.fullmatch(name):
                raise DepgraphError(f"the recipe gives a part of the model the name {name[:60]!r}")
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
    arguments = dict(arguments)
    implementation = arguments.pop(IMPLEMENTATION, None)
    config = made.config_class.from_dict(arguments)
    if implementation is not None:
        config._attn_implementation = implementation
    return made(config)


_MAKERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
LIBRARIES = tuple(_MAKERS)
"""Libraries whose constructors a recipe may name."""
