"""What an argument of a constructor may be, where a stranger's folder names it.

Numbers, truth values, short words, and lists and mappings of these: none that could name a file, an
address, a checkpoint, a device or code, and no number that makes a constructor work without end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from depgraph.errors import DepgraphError

MAX_INTEGER = 1 << 24
"""Largest integer among the arguments of a recipe: no vocabulary, image or context is larger."""

_FORBIDDEN_WORDS = frozenset(
    {"pretrained", "checkpoint", "weights", "overlay", "code", "path", "file", "filename", "files"}
    | {"dir", "directory", "folder", "url", "uri", "hub", "repo", "cache", "device"}
)
_FORBIDDEN = frozenset(
    {"auto_map", "kernel_config", "use_kernels", "quantization_config", "distributed_config"}
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
_LARGEST = ((_LENGTHS, 1 << 10), (frozenset({"labels"}), 1 << 20))
"""Words in keys, and the largest integer there: forwards are as long as layers are many."""
_MAX_DEPTH, _MAX_WORD = 16, 200


def listed(value: Any) -> Any:
    """Plain data as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_value(where: str, key: str, value: Any, depth: int = 0) -> None:
    """Refuse an argument that might be more than plain data.

    Parameters
    ----------
    where : str
        Path of keys that leads to it.
    key : str
        The last of them that is a name.
    value : object
    depth : int
        How deep it is nested.

    Raises
    ------
    DepgraphError
        Naming it.
    """
    if depth > _MAX_DEPTH:
        raise DepgraphError(f"argument '{where[:60]}' of a recipe is nested too deeply")
    words = key.lower().split("_")
    if key in _FORBIDDEN or not words[0] or not _FORBIDDEN_WORDS.isdisjoint(words):
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
                check_value(f"{where}.{name}", str(name), item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_value(where, key, item, depth + 1)
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
    words = key.lower().split("_")
    found = [largest for of, largest in _LARGEST if not of.isdisjoint(words)]
    return min(found, default=MAX_INTEGER)


def _is_plain(value: Any, largest: int) -> bool:
    if isinstance(value, str):
        return (
            len(value) <= _MAX_WORD and not value.startswith(".") and not set(value) & set("/\\:~")
        )
    if type(value) is int:
        return abs(value) <= largest
    return value is None or type(value) is bool or (type(value) is float and math.isfinite(value))
