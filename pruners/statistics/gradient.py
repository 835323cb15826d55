"""The gradient of the loss, and the metric that is made of it alone: first-order Taylor.

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
from torch.func import functional_call, grad_and_value

from depgraph import DependencyGraph, DepgraphError
from depgraph.tracing.trace import shape
from pruners.registry import Batch
from pruners.statistics.units import reduce_others, sum_over_members

Loss = Callable[[Any, Tensor], Tensor]
"""Model output and targets -> mean loss."""


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits; the default loss."""
    return F.cross_entropy(output, targets)


def loss_of(model: nn.Module, fixed: dict[str, Tensor], loss: Loss) -> Callable[..., Tensor]:
    """The loss as a function of the scored parameters, inputs and targets."""

    def of(parameters: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        return loss(functional_call(model, {**fixed, **parameters}, args), targets)

    return of


def scored(model: nn.Module, graph: DependencyGraph) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detached parameters that prunable groups hold, and every other parameter and buffer."""
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


def check_targets(graph: DependencyGraph, batches: Sequence[Batch], loss: Loss) -> None:
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


def check_loss(loss: Tensor, name: str) -> None:
    if not torch.isfinite(loss).all():
        raise DepgraphError(
            f"metric '{name}': the loss is not finite on these batches; check the weights, the "
            "inputs' scale and the targets"
        )


class Taylor:
    """Absolute gradient of a gate that multiplies all parameters of a unit.

    ``|sum over members of w * dL/dw|``, the gradient averaged over all samples.

    References
    ----------
    Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning",
    CVPR 2019, eq. 8, summed within a group before the absolute value is taken.
    """

    name = "taylor"
    needs_data = True

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss or cross_entropy

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One first-order estimate of the change of the loss per unit."""
        check_targets(graph, batches, self.loss)
        parameters, fixed = scored(model, graph)
        gradient = {
            name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()
        }
        step = grad_and_value(loss_of(model, fixed, self.loss))
        count = 0
        with evaluating(model):
            for inputs, targets in batches:
                grads, loss = step(parameters, inputs, targets)
                check_loss(loss, self.name)
                for name, grad in grads.items():
                    gradient[name] += grad * len(targets)
                count += len(targets)

        def reduction(name: str, dim: int) -> Tensor:
            return reduce_others(parameters[name] * gradient[name] / count, dim)

        return {name: s.abs() for name, s in sum_over_members(graph, reduction).items()}
