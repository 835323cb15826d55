"""Importance by source domain: a unit that only one domain's style uses counts for less.

A metric's scores over a mixture of domains say how much a unit matters on average. What is asked
for is a domain that nobody has seen, and what matters in all known domains is the better guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError
from pruners.choosing.choices import check_choice
from pruners.metrics.scoring import samples_wanted, take_samples
from pruners.registry import Batch, Metric, make_metric

Scores = Mapping[str, Tensor]
"""One per unit, by group name."""

Combination = Callable[[Tensor], Tensor]
"""Scores (domains, units) -> (units,)."""


LEAST = 1e-3
"""Share of its mean that a unit's score keeps at least, so that scores stay positive."""


def _variance(strictness: float) -> Combination:
    def less_spread(each: Tensor) -> Tensor:
        mean = each.mean(0)
        return torch.maximum(mean - strictness * each.std(0, correction=0), LEAST * mean)

    return less_spread


_CANDIDATES: dict[str, Combination] = {
    "mean": lambda each: each.mean(0),
    "variance": _variance(1.0),
    "min": lambda each: each.amin(0),
}

LEAVE_ONE_OUT = "leave-one-out"
COMBINATIONS = (*_CANDIDATES, LEAVE_ONE_OUT)
"""How scores of several domains become one."""


class DomainAware:
    """A metric's scores for each domain apart, combined so that common units count most.

    Parameters
    ----------
    metric : str or Metric
        One that needs data.
    domains : mapping of str to iterable of (inputs, targets)
        Batches of each source domain, two domains at least. Batches that are passed to `prune` are
        for the compensation only.
    combine : str
        ``"mean"``; ``"min"``, over domains; ``"variance"``, the mean less `strictness` standard
        deviations; ``"leave-one-out"``, that of these three which, made from all domains but one,
        orders units most like the one left out does, on average over domains: the nearest to a
        test on an unseen domain that the sources allow.
    strictness : float
        Of ``"variance"``.
    num_samples : int, optional
        Of all domains together; they have equal shares. By default as many as the metric asks for,
        or as there are.
    seed : int
        For metrics that draw at random.

    Notes
    -----
    Scores of a domain are divided by their mean over all units first, so that one with a larger
    loss does not decide alone; what is combined has the mean of the domains' means, so that scores
    that are rises of the loss stay that.

    Raises
    ------
    DepgraphError
        For fewer than two domains, a metric without data, and a combination that there is not.

    Examples
    --------
    >>> import pruners
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> data = {d: [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))] for d in ("a", "b")}
    >>> small, _ = pruners.prune(net, torch.randn(1, 4), DomainAware("fisher", data, "min"), 0.5)
    >>> small[0].out_features
    3
    """

    needs_data = False  # it brings its own

    def __init__(
        self,
        metric: str | Metric,
        domains: Mapping[str, Iterable[Batch]],
        combine: str = "variance",
        *,
        strictness: float = 1.0,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("combination", combine, COMBINATIONS)
        self.metric = make_metric(metric, seed=seed)
        if not self.metric.needs_data:
            raise DepgraphError(
                f"metric '{self.metric.name}' looks at no data, so it is the same for all domains; "
                "choose one that does"
            )
        if len(domains) < 2:
            raise DepgraphError(
                f"there is {len(domains)} source domain; importance across domains takes at least "
                "two"
            )
        self.domains = domains
        self.combine = combine
        self.strictness = strictness
        self.samples_each = -(-(num_samples or samples_wanted(self.metric)) // len(domains))
        self.exact = num_samples is not None
        self.name = f"{self.metric.name}, {combine} of {len(domains)} domains"
        self.additive = bool(getattr(self.metric, "additive", False))
        self.normalise = getattr(self.metric, "normalise", None)

    @property
    def loss(self) -> Any:
        """The loss of the metric, where it has one."""
        return getattr(self.metric, "loss", None)

    @loss.setter
    def loss(self, loss: Any) -> None:
        if hasattr(self.metric, "loss"):
            self.metric.loss = loss

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One combined score per unit."""
        return combine_scores(
            self.by_domain(model, graph), self.combine, strictness=self.strictness
        )

    def by_domain(self, model: nn.Module, graph: DependencyGraph) -> dict[str, dict[str, Tensor]]:
        """The metric's scores for each domain, as they are."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found = {}
        for domain, batches in self.domains.items():
            taken = take_samples(batches, self.samples_each, device, exact=self.exact)
            found[domain] = self.metric.score(model, graph, taken)
        return found


def combine_scores(
    by_domain: Mapping[str, Scores], how: str, *, strictness: float = 1.0
) -> dict[str, Tensor]:
    """Scores of several domains as one.

    Parameters
    ----------
    by_domain : mapping of str to scores
    how, strictness
        See `DomainAware`.

    Returns
    -------
    dict of str to Tensor (group.size,)
    """
    each, mean = _scaled(by_domain)
    candidates = {**_CANDIDATES, "variance": _variance(strictness)}
    chosen = best_combination(list(each.values()), candidates) if how == LEAVE_ONE_OUT else how
    return {name: candidates[chosen](values) * mean for name, values in each.items()}


def foretelling(by_domain: Mapping[str, Scores]) -> str:
    """The combination that ``"leave-one-out"`` is, of these scores.

    Parameters
    ----------
    by_domain : mapping of str to scores

    Returns
    -------
    str
    """
    return best_combination(list(_scaled(by_domain)[0].values()), _CANDIDATES)


def _scaled(by_domain: Mapping[str, Scores]) -> tuple[dict[str, Tensor], Tensor]:
    """Scores (domains, units) of each group, each domain's of mean one; the mean of the means."""
    scores = [
        {n: torch.as_tensor(v).double().cpu() for n, v in s.items()} for s in by_domain.values()
    ]
    means = [torch.cat(list(s.values())).mean().clamp_min(1e-30) for s in scores]
    each = {
        name: torch.stack([s[name] / mean for s, mean in zip(scores, means, strict=True)])
        for name in scores[0]
    }
    return each, torch.stack(means).mean()


def best_combination(each: Sequence[Tensor], candidates: Mapping[str, Combination]) -> str:
    """The candidate that orders units most like the domain that it does not see.

    Parameters
    ----------
    each : sequence of Tensor (domains, units)
        One for each group.
    candidates : mapping of str to combination

    Returns
    -------
    str
        The first of the best by Spearman's rank correlation within groups, on average over the
        domains left out and over units.
    """

    def agreement(name: str) -> float:
        total = 0.0
        for scores in each:
            for out in range(len(scores)):
                others = torch.cat([scores[:out], scores[out + 1 :]])
                correlation = _rank_correlation(candidates[name](others), scores[out])
                total += correlation * scores.shape[1]
        return total

    return max(candidates, key=agreement)


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    if len(first) < 2:
        return 0.0
    ranks = [
        values.argsort(stable=True).argsort(stable=True).double() for values in (first, second)
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
