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
    """What reached a batch norm.

    Attributes
    ----------
    mean, variance : Tensor (channels,)
        In float64.
    count : int
        Values of each channel.
    """

    mean: Tensor
    variance: Tensor
    count: int

    def with_more(self, other: Observed) -> Observed:
        """Both together."""
        count = self.count + other.count
        share = other.count / count
        apart = (other.mean - self.mean).square() * share * (1 - share)
        variance = self.variance.lerp(other.variance, share) + apart
        return Observed(self.mean.lerp(other.mean, share), variance, count)


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
    return Observed(values.mean(1), values.var(1, correction=0), values.shape[1])


class Recalibration:
    """Moves running statistics by as much as the cut moved what reaches the norm.

    The means by the difference of the observed ones, the variances by their ratio: on the samples
    at hand alone, statistics of many more samples would be thrown away, and a norm that the cut
    does not reach would change too. After each batch they are those of all batches so far, so that
    the norms behind see what they will see.

    Parameters
    ----------
    plan : Plan
    names : set of str
        Buffers of means whose norms are heeded: those that are applied once in a forward.
    original : dict of str to (mean, variance)
        What the statistics were before any recalibration; what is lacking is added.
    """

    def __init__(
        self, plan: Plan, names: set[str], original: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        self.kept = plan.kept_buffers
        self.names = names
        self.original = original
        self.seen: dict[str, tuple[Observed, Observed]] = {}

    def __call__(
        self, name: str, seen: Observed, was: Observed, mean: Tensor, variance: Tensor
    ) -> None:
        """Change the statistics of a norm of the pruned model, just before it is applied.

        Parameters
        ----------
        name : str
            Of its buffer of means.
        seen, was : Observed
            What reaches it in this batch, and what reaches that of the dense model.
        mean, variance : Tensor (channels,)
            The buffers.
        """
        kept = self.kept.get(name, {}).get(0)
        index: Any = slice(None) if kept is None else kept.to(mean.device)
        was = Observed(was.mean[index], was.variance[index], was.count)
        if name in self.seen:
            now, then = self.seen[name]
            seen, was = now.with_more(seen), then.with_more(was)
        self.seen[name] = seen, was
        before = self.original.setdefault(name, (mean.clone(), variance.clone()))
        # without spread on these samples (a single one, say) the ratio is that of rounding
        least = EVENNESS * before[1].double() + 1e-30
        mean.copy_(before[0] + (seen.mean - was.mean))
        variance.copy_(before[1] * ((seen.variance + least) / (was.variance + least)))
