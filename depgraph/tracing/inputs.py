"""Example inputs and the state of a traced model as plain data, for plans that trace it again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from depgraph.errors import DepgraphError
from depgraph.tracing.modules import named_modules

if TYPE_CHECKING:
    from depgraph.tracing.trace import Trace

_MAX_ELEMENTS = 1 << 31
State = dict[str, Any]
"""``{"training": False, "others": ["head.drop"], "dtypes": {"float16": ["head.weight"]}}``: mode of
the model, modules in the other one, and tensors of another floating type than float32."""


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
            spec = {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}
            return {**spec, "values": value.tolist()} if next(places) in read else spec
        if isinstance(value, (list, tuple)):
            return [described(item) for item in value]
        if isinstance(value, Mapping):
            return {"items": {name: described(item) for name, item in value.items()}}
        return value

    spec = described(list(args))
    return described(kwargs) if kwargs else spec


def example_from_spec(spec: Any) -> Any:
    """What `input_spec` wrote down, with meta tensors, as `trace` takes it.

    Raises
    ------
    DepgraphError
        When a shape or dtype is none.
    """
    if isinstance(spec, list):
        return tuple(map(example_from_spec, spec))
    if isinstance(spec, dict) and "items" in spec:
        return {name: example_from_spec(item) for name, item in spec["items"].items()}
    if not isinstance(spec, dict):
        return spec
    sizes = spec.get("shape")
    if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for n in sizes):
        raise DepgraphError(f"an example input of the plan has {str(sizes)[:60]!r} for a shape")
    dtype = dtype_named(spec.get("dtype"))
    if prod(sizes) > _MAX_ELEMENTS:
        raise DepgraphError(
            f"an example input of the plan has more than {_MAX_ELEMENTS} elements; trace the model "
            "with a smaller one"
        )
    try:
        if "values" in spec:
            return torch.tensor(spec["values"], dtype=dtype).reshape(sizes)
        return torch.empty(sizes, dtype=dtype, device="meta")
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise DepgraphError(f"no example input can have the shape {sizes[:8]}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: Any) -> torch.dtype:
    """The dtype of that name.

    Raises
    ------
    DepgraphError
        When torch has none.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise DepgraphError(f"torch has no dtype {str(name)[:40]!r}")
    return found


def trace_state(traced: Trace) -> State:
    """In which modes and floating types a model was traced."""
    tensors = {name: node.meta["val"].dtype for name, node in traced.tensors.items()}
    return state(traced.modes, tensors)


def state(modes: Mapping[str, bool], dtypes: Mapping[str, torch.dtype]) -> State:
    """Modes and floating types as plain data."""
    root = modes.get("", False)
    others: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        if dtype.is_floating_point and dtype != torch.float32:
            others.setdefault(dtype_name(dtype), []).append(name)
    different = [name for name, mode in modes.items() if mode != root]
    return {"training": root, "others": different, "dtypes": others}


def state_dtypes(state: State) -> dict[str, torch.dtype]:
    """Floating types of tensors, by name, where they are not float32."""
    named = state.get("dtypes", {}).items()
    return {name: dtype_named(dtype) for dtype, names in named for name in names}


def set_modes(model: nn.Module, state: State) -> None:
    """Put each module into the mode that a state says."""
    root, others = bool(state.get("training", False)), set(state.get("others", ()))
    for name, module in named_modules(model).items():
        module.training = root != (name in others)
