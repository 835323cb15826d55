"""What metrics look at, taken from batches, and the scores that they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError
from pruners.registry import Batch, Metric, make_metric
from pruners.statistics.finite import check_batch, check_weights

DEFAULT_SAMPLES = 64
"""Samples that a metric with data looks at, unless told otherwise or it asks for more."""

CALIBRATION_SAMPLES = 256
"""Samples that the compensation is fitted to, where there are as many."""


def shared_samples(
    model: nn.Module,
    scorer: Metric,
    batches: Iterable[Batch] | None,
    calibration: Iterable[Batch] | None,
    num_samples: int | None,
    num_calibration: int | None,
) -> tuple[Iterable[Batch] | None, Taken]:
    """What the metric and what the compensation look at: the same, unless there are two.

    A stream of batches is read once, and kept in memory; what can be gone through again, as a list
    or a loader, is gone through again for the compensation, a batch at a time.
    """
    device = _device(model)
    scoring = (num_samples or samples_wanted(scorer)) if scorer.needs_data else 0
    wanted = CALIBRATION_SAMPLES if num_calibration is None else num_calibration
    if wanted < 1:
        raise DepgraphError(f"num_calibration is {num_calibration}; it must be at least 1")
    source = batches if calibration is None else calibration
    assert source is not None
    if isinstance(source, Iterator):
        most = max(scoring, wanted) if calibration is None else wanted
        source = take_samples(source, most, device, exact=False)
        batches = source if calibration is None else batches
    exact = num_calibration is not None
    return batches, Taken(source, wanted, device, exact, "num_calibration")


@dataclass(frozen=True)
class Taken:
    """The first samples of batches, to be gone through many times; never all in memory.

    Attributes
    ----------
    batches : iterable of (inputs, targets)
    wanted : int
        Samples.
    device : torch.device
    exact : bool
        Whether there have to be as many; else fewer will do.
    what : str
        What the number is called, for the error.
    """

    batches: Iterable[Batch]
    wanted: int
    device: torch.device
    exact: bool
    what: str = "num_samples"

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches on the device.

        Raises
        ------
        DepgraphError
            When a batch has another form or numbers that are not finite, or there are too few
            samples.
        """
        count = 0
        for number, batch in enumerate(self.batches):
            inputs, targets = _checked(batch)
            size = min(len(targets), self.wanted - count)
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            moved = tuple(x[:size].to(self.device) for x in args)
            check_batch(moved, targets[:size], number)
            yield (moved if len(moved) > 1 else moved[0]), targets[:size].to(self.device)
            count += size
            if count == self.wanted:
                return
        if count == 0:
            raise DepgraphError("the batches hold no sample; pass at least one (inputs, targets)")
        if self.exact:
            raise DepgraphError(
                f"the batches hold {count} samples, fewer than {self.what}={self.wanted}"
            )


def samples_wanted(scorer: Metric) -> int:
    """Samples that a metric looks at when nothing is said."""
    return int(getattr(scorer, "num_samples", DEFAULT_SAMPLES))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def score(
    model: nn.Module,
    graph: DependencyGraph,
    metric: str | Metric,
    batches: Iterable[Batch] | None = None,
    *,
    num_samples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of every unit of every prunable group.

    Parameters
    ----------
    model : nn.Module
    graph : DependencyGraph
        Of this model.
    metric : str or Metric
    batches : iterable of (inputs, targets), optional
    num_samples : int, optional
        Samples to use; by default `DEFAULT_SAMPLES`, or what the metric asks for.
    seed : int
        For the random metric.

    Returns
    -------
    dict of str to Tensor (group.size,)

    Raises
    ------
    DepgraphError
        When the metric needs data and there is none, or less than asked for; when a weight or an
        input is not finite.
    """
    scorer = make_metric(metric, seed=seed)
    check_weights(model)
    return scorer.score(model, graph, scored_on(model, scorer, batches, num_samples))


def scored_on(
    model: nn.Module, scorer: Metric, batches: Iterable[Batch] | None, num_samples: int | None
) -> list[Batch]:
    """The samples that a metric looks at; none for one that needs no data."""
    if not scorer.needs_data:
        return []
    if batches is None:
        raise DepgraphError(
            f"metric '{scorer.name}' needs data; pass batches=[(inputs, targets), ...]"
        )
    wanted = samples_wanted(scorer) if num_samples is None else num_samples
    return take_samples(batches, wanted, _device(model), exact=num_samples is not None)


def take_samples(
    batches: Iterable[Batch],
    wanted: int,
    device: torch.device,
    exact: bool,
    what: str = "num_samples",
) -> list[Batch]:
    """The first batches that together hold a number of samples, in memory; see `Taken`."""
    if wanted < 1:
        raise DepgraphError(f"{what} is {wanted}; it must be at least 1")
    return list(Taken(batches, wanted, device, exact, what))


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DepgraphError("each batch must be a pair (inputs, targets) with targets a Tensor")
    inputs, targets = batch
    first = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
    if not isinstance(first, Tensor) or first.dim() == 0 or len(first) != len(targets):
        raise DepgraphError("each batch must hold as many inputs as targets, as Tensors")
    return inputs, targets
