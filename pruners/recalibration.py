"""Brings the statistics of batch norms up to date with what reaches them after a cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from depgraph import Plan

EVENNESS = 1e-3
"""Share of a norm's own variance that is added to those observed before they are compared."""

_ATEN = torch.ops.aten  # what a forward that the slicer generated calls
_STATISTICS_AT = {
    F.batch_norm: 1,
    torch.batch_norm: 3,
    _ATEN.batch_norm.default: 3,
}
"""Functions that normalise by running statistics, and where among the arguments these are."""


@dataclass
class Observed:
    """What reached one batch norm on the calibration samples.

    Attributes
    ----------
    mean, variance : Tensor (channels,)
        In float64.
    times : int
        How often the norm was applied.
    """

    mean: Tensor
    variance: Tensor
    times: int = 1


class WatchNorms(TorchFunctionMode):
    """Calls a function before each application of a batch norm with running statistics.

    Parameters
    ----------
    model : nn.Module
    before : callable
        Gets the name of the buffer of means, what is observed, and the buffers of means and
        variances, which it may change.
    """

    def __init__(
        self, model: nn.Module, before: Callable[[str, Observed, Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self.names = {id(buffer): name for name, buffer in model.named_buffers()}
        self.before = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at the inputs of a batch norm, then run it."""
        kwargs = kwargs or {}
        if func in _STATISTICS_AT:
            place = _STATISTICS_AT[func]
            given = dict(
                zip(("running_mean", "running_var"), args[place : place + 2], strict=False)
            )
            given = {**given, **kwargs}
            mean, variance = given.get("running_mean"), given.get("running_var")
            x = args[0] if args else kwargs["input"]
            if mean is not None and id(mean) in self.names and variance is not None:
                self.before(self.names[id(mean)], _observe(x), mean, variance)
        return func(*args, **kwargs)


def _observe(x: Tensor) -> Observed:
    values = x.transpose(0, 1).flatten(1).double()
    return Observed(values.mean(1), values.var(1, correction=0))


def observe_norms(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Observed]:
    """What reaches each batch norm of a model in a forward.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; stays as it is.
    forward : callable
        Runs it.

    Returns
    -------
    dict of str to Observed
        By the name of the buffer of means; empty for a model without batch norms.
    """
    found: dict[str, Observed] = {}

    def before(name: str, seen: Observed, mean: Tensor, variance: Tensor) -> None:
        if name in found:
            found[name].times += 1
        else:
            found[name] = seen

    if any(name.endswith("running_mean") for name, _ in model.named_buffers()):
        with torch.no_grad(), WatchNorms(model, before):
            forward()
    return found


class Recalibration:
    """Moves running statistics by as much as the cut moved what reaches the norm.

    The means by the difference of the observed ones, the variances by their ratio: on the samples
    at hand alone, statistics of many more samples would be thrown away, and a norm that the cut
    does not reach would change too. A norm that is applied several times is left as it is.

    Parameters
    ----------
    plan : Plan
    dense : dict of str to Observed
        Of the model that the plan was applied to, on the same samples.
    """

    def __init__(self, plan: Plan, dense: dict[str, Observed]) -> None:
        self.kept = plan.kept_buffers
        self.dense = {name: seen for name, seen in dense.items() if seen.times == 1}
        self.done: list[str] = []

    def __call__(self, name: str, seen: Observed, mean: Tensor, variance: Tensor) -> None:
        """Change the statistics of a norm of the pruned model, just before it is applied."""
        if name not in self.dense:
            return
        was = self.dense[name]
        kept = self.kept.get(name, {}).get(0)
        index: Any = slice(None) if kept is None else kept.to(mean.device)
        mean += (seen.mean - was.mean[index]).to(mean)
        # without spread on these samples (a single one, say) the ratio is that of rounding
        least = EVENNESS * variance.double() + 1e-30
        variance *= ((seen.variance + least) / (was.variance[index] + least)).to(variance)
        self.done.append(name)
