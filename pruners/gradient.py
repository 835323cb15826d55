"""Metrics that need data: first- and second-order Taylor expansions of the loss.

Gradients are taken by ``torch.func`` of detached parameters, so a frozen model is scored like any
other, and neither ``.grad`` nor ``requires_grad`` of the caller's parameters changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from depgraph import DependencyGraph, DepgraphError
from depgraph.trace import shape
from pruners._units import reduce_others, sum_over_members
from pruners.metrics import Batch, register

Loss = Callable[[Any, Tensor], Tensor]
"""Model output and targets -> mean loss."""

CHUNK_BYTES = 1 << 30
"""Memory that the per-sample gradients of one chunk may take."""


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits; the default loss."""
    return F.cross_entropy(output, targets)


class _Expansion:
    """What both expansions share: the loss as a function of the scored parameters."""

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss or cross_entropy

    def _loss_of(self, model: nn.Module, fixed: dict[str, Tensor]) -> Callable[..., Tensor]:
        def loss(parameters: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            output = functional_call(model, {**fixed, **parameters}, args)
            return self.loss(output, targets)

        return loss


def _scored(
    model: nn.Module, graph: DependencyGraph
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detached parameters that prunable groups hold, and everything else."""
    names = {member.parameter for group in graph.prunable for member in group.members}
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach() for name, tensor in state.items()}
    return (
        {name: state[name] for name in state if name in names},
        {name: state[name] for name in state if name not in names},
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_targets(graph: DependencyGraph, batches: Sequence[Batch], loss: Loss) -> None:
    """With the default loss, class indices have to be among the model's outputs."""
    if loss is not cross_entropy:
        return
    classes = shape(graph.traced.outputs[0])[-1]
    for _, targets in batches:
        integers = not targets.is_floating_point()
        if integers and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
            raise DepgraphError(
                f"the targets go from {int(targets.min())} to {int(targets.max())}, but the model "
                f"has {classes} classes; create it with as many as the data has"
            )


def _check(loss: Tensor, name: str) -> None:
    if not torch.isfinite(loss).all():
        raise DepgraphError(
            f"metric '{name}': the loss is not finite on these batches; check the weights, the "
            "inputs' scale and the targets"
        )


@register
class Taylor(_Expansion):
    """Absolute gradient of a gate that multiplies all parameters of a unit.

    ``|sum over members of w * dL/dw|``, the gradient averaged over all samples.

    References
    ----------
    Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning",
    CVPR 2019, eq. 8, summed within a group before the absolute value is taken.
    """

    name = "taylor"
    needs_data = True

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One first-order estimate of the change of the loss per unit."""
        _check_targets(graph, batches, self.loss)
        parameters, fixed = _scored(model, graph)
        gradient = {
            name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()
        }
        step = grad_and_value(self._loss_of(model, fixed))
        count = 0
        with evaluating(model):
            for inputs, targets in batches:
                grads, loss = step(parameters, inputs, targets)
                _check(loss, self.name)
                for name, grad in grads.items():
                    gradient[name] += grad * len(targets)
                count += len(targets)

        def reduction(name: str, dim: int) -> Tensor:
            return reduce_others(parameters[name] * gradient[name] / count, dim)

        return {name: s.abs() for name, s in sum_over_members(graph, reduction).items()}


@register
class Hessian(_Expansion):
    """Rise of the loss when a unit is switched off, by a diagonal second-order expansion.

    ``sum over members of 0.5 * h * w^2``, with the diagonal ``h`` of the empirical Fisher matrix,
    the mean over samples of squared per-sample gradients, in place of the Hessian's.

    References
    ----------
    LeCun, Denker, Solla: "Optimal Brain Damage", NeurIPS 1989, eq. 5.
    Riaz, Smeaton: grouped structural global pruning of vision transformers for domain
    generalisation, 2025.
    """

    name = "hessian"
    needs_data = True

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One second-order estimate of the change of the loss per unit."""
        _check_targets(graph, batches, self.loss)
        parameters, fixed = _scored(model, graph)
        squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        count = 0
        with evaluating(model):
            for gradients, losses in self._per_sample(model, parameters, fixed, batches):
                _check(losses, self.name)
                for name, gradient in gradients.items():
                    squares[name] += gradient.float().square().sum(0)  # gradients may share memory
                count += len(losses)

        def reduction(name: str, dim: int) -> Tensor:
            return reduce_others(parameters[name].float() ** 2 * squares[name], dim) / (2 * count)

        return sum_over_members(graph, reduction)

    def _per_sample(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        fixed: dict[str, Tensor],
        batches: Sequence[Batch],
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Gradients and losses with a leading dimension of samples, a chunk at a time."""
        loss = self._loss_of(model, fixed)

        def one(p: dict[str, Tensor], inputs: Any, target: Tensor) -> Tensor:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            return loss(p, tuple(x.unsqueeze(0) for x in args), target.unsqueeze(0))

        step = vmap(grad_and_value(one), in_dims=(None, 0, 0))
        size = sum(p.numel() for p in parameters.values()) * 4
        chunk = max(1, CHUNK_BYTES // size)
        for inputs, targets in batches:
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                # The fused kernels have no batched form under vmap.
                with sdpa_kernel(SDPBackend.MATH):
                    yield step(parameters, tuple(x[part] for x in args), targets[part])
