"""From ``--across-domains`` to the metric that scores each source domain apart."""

from __future__ import annotations

from collections.abc import Sequence

import click
from torch import nn

import domains
import pruners
from domains import DomainData, Split
from pruners.registry import Metric


def check_across(how: str | None, metric: str, sources: Sequence[str] | None) -> None:
    """Refuse, before any work, what `across_domains` could not do.

    Parameters
    ----------
    how : str or None
        Of ``--across-domains``.
    metric : str
    sources : sequence of str or None
        Domains that may be looked at; None without data.

    Raises
    ------
    click.UsageError
    """
    if how is None:
        return
    if not pruners.make_metric(metric).needs_data:
        raise click.UsageError(
            f"--across-domains needs a metric that looks at images, which '{metric}' does not; "
            "`depgraph-prune metrics` lists those that do"
        )
    if sources is None:
        raise click.UsageError("--across-domains looks at images; say where with --data")
    if len(sources) < 2:
        raise click.UsageError("--across-domains needs two source domains at least")


def across_domains(
    metric: Metric,
    how: str | None,
    model: nn.Module,
    samples: Split | DomainData,
    *,
    num_samples: int | None = None,
    seed: int = 0,
) -> Metric:
    """The metric, scoring each source domain apart; as it is where `how` is None.

    Parameters
    ----------
    metric : Metric
    how : str or None
        One of `pruners.COMBINATIONS`.
    model : nn.Module
        Decides size and normalisation of the images.
    samples : Split or DomainData
        Of a Split: the training part of each source domain.
    num_samples : int, optional
        Of all domains together.
    seed : int

    Returns
    -------
    Metric
    """
    if how is None:
        return metric
    parts = samples.train if isinstance(samples, Split) else samples.samples
    each = {
        domain: domains.batches(model, part, batch_size=16, seed=seed)
        for domain, part in parts.items()
    }
    return pruners.DomainAware(metric, each, how, num_samples=num_samples, seed=seed)
