"""Example inputs as plain data, for plans that trace the model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def input_spec(example: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Example inputs as plain data: shapes and dtypes in place of tensors."""
    args, kwargs = example
    return _described(kwargs) if kwargs else _described(list(args))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, Mapping):
        return {"items": {name: _described(item) for name, item in value.items()}}
    return value


def example_from_spec(spec: Any) -> Any:
    """What `input_spec` wrote down, with meta tensors, as `trace` takes it."""
    if isinstance(spec, list):
        return tuple(map(example_from_spec, spec))
    if isinstance(spec, dict) and "items" in spec:
        return {name: example_from_spec(item) for name, item in spec["items"].items()}
    if isinstance(spec, dict):
        return torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]), device="meta")
    return spec
