"""Gradients of the loss for each sample apart: squared and added up, or of a gate on each unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from depgraph import DependencyGraph
from pruners.registry import Batch
from pruners.statistics.gradient import Loss, check_loss, evaluating, loss_of, scored
from pruners.statistics.units import reduce_others, sum_over_members

CHUNK_BYTES = 1 << 30
"""Memory that the per-sample gradients of one chunk may take."""


def squared_gradients(
    model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch], loss: Loss, name: str
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of each scored parameter.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode; stays as it is.
    graph : DependencyGraph
    batches : sequence of (inputs, targets)
    loss : callable
    name : str
        Of the metric, for the error.

    Returns
    -------
    dict of str to Tensor, float32
        Shaped like the parameters that prunable groups hold.
    """
    parameters, fixed = scored(model, graph)
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = 0
    with evaluating(model):
        for gradients, losses in _per_sample(model, parameters, fixed, batches, loss):
            check_loss(losses, name)
            for key, gradient in gradients.items():
                squares[key] += gradient.float().square().sum(0)  # gradients may share memory
            count += len(losses)
    return {key: total / count for key, total in squares.items()}


def gate_gradients(
    model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch], loss: Loss, name: str
) -> Iterator[dict[str, Tensor]]:
    """Derivative of each sample's loss by a gate that multiplies all parameters of a unit.

    Parameters
    ----------
    model, graph, batches, loss, name
        See `squared_gradients`.

    Yields
    ------
    dict of str to Tensor (samples, group.size)
        A chunk of samples at a time; in float64.
    """
    parameters, fixed = scored(model, graph)
    with evaluating(model):
        for gradients, losses in _per_sample(model, parameters, fixed, batches, loss):
            check_loss(losses, name)

            def reduction(key: str, dim: int, gradients: dict[str, Tensor] = gradients) -> Tensor:
                return reduce_others(parameters[key] * gradients[key], dim + 1, keep=(0,))

            yield sum_over_members(graph, reduction)


def _per_sample(
    model: nn.Module,
    parameters: dict[str, Tensor],
    fixed: dict[str, Tensor],
    batches: Sequence[Batch],
    loss: Loss,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Gradients and losses with a leading dimension of samples, a chunk at a time."""
    of = loss_of(model, fixed, loss)

    def one(p: dict[str, Tensor], inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return of(p, tuple(x.unsqueeze(0) for x in inputs), target.unsqueeze(0))

    step = vmap(grad_and_value(one), in_dims=(None, 0, 0))
    size = sum(p.numel() for p in parameters.values()) * 4
    chunk = max(1, CHUNK_BYTES // size)
    for inputs, targets in batches:
        args: tuple[Any, ...] = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            # The fused kernels have no batched form under vmap.
            with sdpa_kernel(SDPBackend.MATH):
                yield step(parameters, tuple(x[part] for x in args), targets[part])
