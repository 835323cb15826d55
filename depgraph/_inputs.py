"""Example inputs as plain data, for plans that trace the model again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor


def input_spec(
    example: tuple[tuple[Any, ...], dict[str, Any]], read: Collection[int] = frozenset()
) -> Any:
    """Example inputs as plain data: shapes and dtypes in place of tensors.

    Parameters
    ----------
    example : tuple of (args, kwargs)
    read : collection of int
        Places, among the tensors of the example, of those whose values the forward reads; these go
        into the data too.
    """
    args, kwargs = example
    places = count()

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            spec = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            return {**spec, "values": value.tolist()} if next(places) in read else spec
        if isinstance(value, (list, tuple)):
            return [described(item) for item in value]
        if isinstance(value, Mapping):
            return {"items": {name: described(item) for name, item in value.items()}}
        return value

    spec = described(list(args))
    return described(kwargs) if kwargs else spec


def example_from_spec(spec: Any) -> Any:
    """What `input_spec` wrote down, with meta tensors, as `trace` takes it."""
    if isinstance(spec, list):
        return tuple(map(example_from_spec, spec))
    if isinstance(spec, dict) and "items" in spec:
        return {name: example_from_spec(item) for name, item in spec["items"].items()}
    if isinstance(spec, dict):
        dtype = getattr(torch, spec["dtype"])
        if "values" in spec:
            return torch.tensor(spec["values"], dtype=dtype).reshape(spec["shape"])
        return torch.empty(spec["shape"], dtype=dtype, device="meta")
    return spec
