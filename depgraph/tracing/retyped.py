"""A model in other types, to be traced: its parameters hold no data then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from depgraph.tracing.modules import named_tensors, structural_copy
from depgraph.tracing.trace import Trace


def as_traced(model: nn.Module, trace: Trace) -> nn.Module:
    """A model in the types of a trace of it, by the names of its tensors.

    Itself where it has these.
    """
    named = named_tensors(model)[0]
    nodes = trace.tensors.items()
    types = {name: node.meta["val"].dtype for name, node in nodes if name in named}
    if all(named[name].dtype is dtype for name, dtype in types.items()):
        return model
    return with_types(model, types)


def with_types(model: nn.Module, types: Mapping[str, torch.dtype]) -> nn.Module:
    """A copy with tensors of these names in these types."""
    copy = structural_copy(model)
    names = {id(tensor): name for name, tensor in named_tensors(copy)[0].items()}
    made: dict[str, Any] = {}
    for module in copy.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for key, tensor in registry.items():
                name = names.get(id(tensor), "")
                if name in types and name not in made:
                    made[name] = _converted(tensor, types[name])
                registry[key] = made.get(name, tensor)
    return copy


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(dtype)
    return nn.Parameter(torch.empty_like(tensor, dtype=dtype, device="meta"), tensor.requires_grad)
